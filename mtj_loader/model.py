"""What `load` returns: the parameters on their devices, and what can be done with them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike

from mtj_loader.distributed.host_group import connect_hosts
from mtj_loader.errors import UsageError
from mtj_loader.formats.token_ids import bos_id, eos_ids
from mtj_loader.generation import generator as generation
from mtj_loader.generation.batch import Shape
from mtj_loader.generation.compile_ahead import CompiledPrograms
from mtj_loader.generation.generator import Generator, Stop
from mtj_loader.generation.prompts import PromptLike, check_batch
from mtj_loader.generation.sampling import SamplingParams
from mtj_loader.generation.tokenizer import Tokenizer
from mtj_loader.loading.load_params import adapt_params, load_params
from mtj_loader.loading.load_report import LoadReport
from mtj_loader.loading.placement import Params
from mtj_loader.models.config import ModelConfig
from mtj_loader.models.forward import Forward
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.planner import add_adapters
from mtj_loader.storage.base import closing_all

PathLike = str | os.PathLike[str]
AdapterLike = PathLike | Sequence[tuple[PathLike, float]]


@dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
      params: `params[module][param]`, MTJ's Haiku tree; every array is [n, …], split over `mp`.
      config: the model's sizes and settings.
      mesh: its devices, axes dp and mp.
      tokenizer: None if the checkpoint brings none.
      report: what the load did.
      plan: what was loaded, and how.
      forward: the model's compiled functions, for code that wants them one by one.
      compiled: what was, or still is, compiled ahead.
      begun: when the load that `report` is about began, in seconds of `time.perf_counter`.
      base: the model that adapters were added to after loading, None for others.
    """

    params: Params
    config: ModelConfig
    mesh: Mesh
    tokenizer: Tokenizer | None
    report: LoadReport
    plan: LoadPlan
    forward: Forward
    compiled: CompiledPrograms
    begun: float
    base: Model | None = None

    @property
    def warm(self) -> tuple[Shape, ...]:
        """The shapes of batches that were, or are being, compiled ahead."""
        return self.compiled.shapes

    def logits(self, ids: ArrayLike) -> jax.Array:
        """Logits for every position of whole sequences.

        Args:
          ids: token ids [batch, seq]; any batch size.

        Returns:
          float32 [batch, seq, vocab_size], without the vocabulary's padding.

        Raises:
          PromptError: ids outside the vocabulary, or more positions than the model has.
        """
        return self.forward.logits(self.params, check_batch(ids, self._generator.rules))

    def generate(
        self,
        prompt: PromptLike | Sequence[PromptLike],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Stop = None,
        seed: int | Sequence[int] = 0,
    ) -> str | list[int] | list[str | list[int]]:
        """Continues a prompt, or several at once.

        Args:
          prompt: a string, token ids, or a list of either. Prompts of unequal length each give
            what they would give alone.
          max_new_tokens: the most tokens to make.
          temperature: 0 always takes the likeliest token.
          top_k: sample among this many of the likeliest tokens; 0 means all.
          top_p: sample among the likeliest tokens that have this probability together.
          stop: end before this string, or before the first of these.
          seed: the same seed gives the same text; a list has one for each prompt.

        Returns:
          The continuation alone: text for text, ids for ids, a list for a list.

        Raises:
          PromptError: a prompt that is empty, too long or outside the vocabulary.
          TokenizerMissingError: text, and no tokenizer.
          UsageError: a sampling setting out of range.
        """
        params = SamplingParams(max_new_tokens, temperature, top_k, top_p, seed)
        return generation.generate(self._generator, prompt, params, stop)

    def stream(
        self,
        prompt: PromptLike,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Stop = None,
        seed: int = 0,
    ) -> Iterator[str] | Iterator[list[int]]:
        """As `generate`, for one prompt, piece by piece as it is made."""
        params = SamplingParams(max_new_tokens, temperature, top_k, top_p, seed)
        return generation.stream(self._generator, prompt, params, stop)

    def state(self, optimizer: optax.GradientTransformation | None = None) -> dict[str, Any]:
        """The state dict that code written against MTJ expects.

        Args:
          optimizer: by default `optax.scale(0.0)`, as MTJ uses for inference.

        Returns:
          `params`; `step`, zeros [n] uint32; `opt_state`, what `optimizer.init` gives on each
          shard, every leaf with MTJ's leading axis n and placed like the parameters.
        """
        optimizer = optax.scale(0.0) if optimizer is None else optimizer
        shards = PartitionSpec("mp")

        def init(params: Params) -> tuple[jax.Array, Any]:
            mine = jax.tree.map(lambda leaf: leaf[0], params)
            fresh = jnp.zeros((), jnp.uint32), optimizer.init(mine)
            return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], fresh)

        on_mesh = jax.shard_map(init, mesh=self.mesh, in_specs=shards, out_specs=shards)
        step, opt_state = jax.jit(on_mesh, out_shardings=NamedSharding(self.mesh, shards))(
            self.params
        )
        return {"params": self.params, "step": step, "opt_state": opt_state}

    def with_adapter(self, adapter: AdapterLike) -> Model:
        """The model with LoRA adapters added; this one stays as it is.

        Parameters that no adapter changes are shared between both.

        Args:
          adapter: an adapter's folder, or several as `[(folder, weight), …]`.

        Raises:
          AdapterError: an adapter is malformed, unsupported or made for another model.
          VerifyError: a base weight that it carries differs from the checkpoint's.
          CheckpointError, MachineError: as `mtj_loader.load`.
          HostError: another host failed.
        """
        with connect_hosts() as hosts, hosts.phase("adapter"):
            plan = add_adapters(self.plan, weighted(adapter))
            with closing_all(*plan.storages):
                params = adapt_params(self.params, self.plan, plan, self.mesh)
        return replace(self, params=params, plan=plan, base=self.without_adapter())

    def without_adapter(self) -> Model:
        """The model without any adapter: bit for bit what the checkpoint alone gives.

        It is the model that `with_adapter` was called on; where the adapter was merged while
        loading, the parameters that it changed are read again.
        """
        if self.base is not None:
            return self.base
        if not self.plan.adapters:
            return self
        unadapted = replace(
            self.plan,
            adapters=(),
            carried=(),
            params=tuple(replace(param, terms=()) for param in self.plan.params),
        )
        begun = time.perf_counter()
        changed = {param.spec for param in self.plan.adapted}
        again = replace(unadapted, params=tuple(p for p in unadapted.params if p.spec in changed))
        with connect_hosts() as hosts, closing_all(*again.storages):
            fresh, report = load_params(again, self.mesh, hosts=hosts)
        params = {m: arrays | fresh.get(m, {}) for m, arrays in self.params.items()}
        return replace(self, params=params, plan=unadapted, report=report, begun=begun)

    @cached_property
    def _generator(self) -> Generator:
        checkpoint = self.plan.checkpoint
        config = checkpoint.config, checkpoint.generation_config
        return Generator(
            self.forward,
            self.params,
            self.tokenizer,
            eos_ids(*config),
            bos_id(*config),
            self.compiled,
            self._on_tokens,
        )

    def _on_tokens(self) -> None:
        """The report says how long it took until there was a first token."""
        self.report.seconds.setdefault("first_token", time.perf_counter() - self.begun)


def weighted(adapter: AdapterLike | None) -> list[tuple[PathLike, float]]:
    """Adapters with their weights; a single one has weight 1.

    Raises:
      UsageError: a list of something else, or a weight that is no finite number.
    """
    if adapter is None:
        return []
    if isinstance(adapter, str | os.PathLike):
        return [(adapter, 1.0)]
    found: list[tuple[PathLike, float]] = []
    for item in adapter if isinstance(adapter, list | tuple) else [adapter]:
        match item:
            case (str() | os.PathLike() as folder, int() | float() as w) if math.isfinite(w):
                found.append((folder, float(w)))
            case _:
                expected = "a folder, or a list of (folder, weight)"
                raise UsageError(
                    "not an adapter", key="adapter", expected=expected, found=repr(item)
                )
    return found
