"""What `load` returns: the parameters on their devices, with methods to run the model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike

from mtj_loader.distributed.host_group import connect_hosts
from mtj_loader.dtypes import has_bfloat16_arithmetic
from mtj_loader.engine.cache_memory import check_cache
from mtj_loader.engine.compile_ahead import CompiledPrograms
from mtj_loader.engine.engine_programs import Programs
from mtj_loader.engine.generate_options import GenerateKeywords, read_options, takes_settings
from mtj_loader.engine.generator import Continuation, Generator
from mtj_loader.engine.keys import Key
from mtj_loader.engine.runner import Engine, EngineSettings
from mtj_loader.formats.token_ids import eos_ids
from mtj_loader.generation.prompts import PromptLike, PromptRules, check_batch
from mtj_loader.generation.row_output import TextPiece
from mtj_loader.generation.tokenizer import Tokenizer
from mtj_loader.loading.load_params import adapt_params, load_params
from mtj_loader.loading.load_report import LoadReport
from mtj_loader.loading.placement import Params
from mtj_loader.models.config import ModelConfig
from mtj_loader.models.forward import Forward
from mtj_loader.options import AdapterLike, weighted
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.planner import add_adapters
from mtj_loader.storage.base import closing_all


@dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
      params: `params[module][param]`, MTJ's Haiku tree; every array is [n, …], split over `mp`.
      config: the model's sizes and settings.
      mesh: its devices, with the axes dp and mp.
      rules: what it accepts as a prompt.
      report: what the load did.
      plan: what was loaded, and how.
      forward: the model's functions, for direct use.
      programs: the compiled programs for generation.
      compiled: those that are compiled ahead of time, finished or in progress.
      engine_settings: how many requests run at a time, and how long they may be.
      started: when the load in `report` began, in seconds of `time.perf_counter`.
      base: the model that `with_adapter` was called on; None if this model did not come from it.
    """

    params: Params
    config: ModelConfig
    mesh: Mesh
    rules: PromptRules
    report: LoadReport
    plan: LoadPlan
    forward: Forward
    programs: Programs
    compiled: CompiledPrograms
    engine_settings: EngineSettings
    started: float
    base: Model | None = None

    def __repr__(self) -> str:
        return f"<Model {self.plan.headline} ({self.mesh.devices.flat[0].platform})>"

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, None if it has none that can be used."""
        return self.rules.tokenizer

    @property
    def warm(self) -> tuple[Key, ...]:
        """The programs that are compiled ahead of time, finished or in progress."""
        return self.compiled.keys

    def logits(self, ids: ArrayLike) -> jax.Array:
        """Logits for every position of whole sequences.

        Args:
          ids: token ids [batch, seq]; any batch size.

        Returns:
          float32 [batch, seq, vocab_size], without the vocabulary's padding.

        Raises:
          PromptError: ids are outside the vocabulary, or a sequence is too long for the model.
        """
        return self.forward.logits(self.params, check_batch(ids, self.rules))

    @takes_settings
    def generate(
        self, prompt: PromptLike | Sequence[PromptLike], **settings: Unpack[GenerateKeywords]
    ) -> str | list[int] | list[str | list[int]]:
        """Continues a prompt, or several at once. Any number of threads may call it.

        Args:
          prompt: a string, token ids, or a list of either. In a list of prompts of different
            lengths, each gives the result that it gives alone.
          {settings}

        Returns:
          The continuation without the prompt: text for text, ids for ids, a list for a list.

        Raises:
          PromptError: a prompt is empty, too long or has ids outside the vocabulary.
          TokenizerMissingError: a prompt is text, and the checkpoint has no tokenizer.
          UsageError: a setting is out of range, or a grammar is at fault.
          GenerationError: no token may be chosen.
          QueueFullError: too many requests are waiting.
          MemoryLimitError: the KV cache does not fit into memory.
        """
        return self.start(prompt, **settings).result()

    @takes_settings
    def stream(
        self, prompt: PromptLike, **settings: Unpack[GenerateKeywords]
    ) -> Iterator[str] | Iterator[list[int]]:
        """Like `generate` for one prompt, but yields each piece as it is generated.

        Closing the iterator ends the request.

        Args:
          prompt: a string or token ids.
          {settings}
        """
        return self.start(prompt, streamed=True, **settings).stream()

    def start(
        self,
        prompt: PromptLike | Sequence[PromptLike],
        *,
        streamed: bool = False,
        **settings: Unpack[GenerateKeywords],
    ) -> Continuation:
        """Prepares what `generate` and `stream` run, for results with more than the text.

        `complete` of the result gives finish reasons and log-probabilities, and `pieces` those of
        every token as it comes.
        """
        params, options, seeds = read_options(settings)
        made = self._generator.start(prompt, params, options, seeds=seeds, streamed=streamed)
        return replace(made, pieces=self._time_first_token(made.pieces))

    def state(self, optimizer: optax.GradientTransformation | None = None) -> dict[str, Any]:
        """The state dict that code written for MTJ expects.

        Args:
          optimizer: by default `optax.scale(0.0)`, as MTJ uses for inference.

        Returns:
          `params`; `step`, zeros [n] uint32; `opt_state`, the result of `optimizer.init` on each
          shard: every leaf has MTJ's leading axis n and is placed like the parameters.
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
        """Returns the model with LoRA adapters added, and leaves this one unchanged.

        Both share the parameters that no adapter changes.

        Args:
          adapter: an adapter's folder, or several as `[(folder, weight), …]`.

        Raises:
          AdapterError: an adapter is malformed, unsupported or made for another model.
          VerifyError: a base weight in an adapter differs from the checkpoint's.
          CheckpointError, MachineError: as in `mtj_loader.load`.
          HostError: another host failed.
        """
        with connect_hosts() as hosts, hosts.phase("adapter"):
            plan = add_adapters(self.plan, weighted(adapter))
            with closing_all(*plan.storages):
                params = adapt_params(self.params, self.plan, plan, self.mesh)
        return replace(self, params=params, plan=plan, base=self.without_adapter())

    def without_adapter(self) -> Model:
        """Returns the model without adapters, bit for bit as loaded from the checkpoint alone.

        This is the model that `with_adapter` was called on. If adapters were merged while loading,
        the parameters that they changed are read again.
        """
        if self.base is not None:
            return self.base
        if not self.plan.adapters:
            return self
        unadapted = self.plan.without_adapters
        started = time.perf_counter()
        changed = {param.spec for param in self.plan.adapted}
        again = replace(unadapted, params=tuple(p for p in unadapted.params if p.spec in changed))
        with connect_hosts() as hosts, closing_all(*again.storages):
            fresh, report = load_params(again, self.mesh, hosts=hosts)
        params = {m: arrays | fresh.get(m, {}) for m, arrays in self.params.items()}
        return replace(self, params=params, plan=unadapted, report=report, started=started)

    @cached_property
    def _generator(self) -> Generator:
        self._warn_of_dtype()
        checkpoint, forward = self.plan.checkpoint, self.forward
        ends = eos_ids(checkpoint.config, checkpoint.generation_config)
        engine = Engine(
            self.programs,
            self.params,
            self.engine_settings,
            check_memory=partial(check_cache, forward),
            threaded=not self.mesh.is_multi_process,
        )
        return Generator(engine, self.rules, ends, forward.frequencies)

    def _warn_of_dtype(self) -> None:
        """Warns where bfloat16 is slow, unless it was chosen."""
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        if on_cpu and self.plan.options.dtype == "auto" and not has_bfloat16_arithmetic():
            warnings.warn(
                "generating with bfloat16 parameters is several times slower than with float32 on "
                "this CPU, which has no bfloat16 arithmetic: load with dtype='float32' (twice the "
                "memory), or with dtype='bfloat16' to keep it without this warning",
                stacklevel=2,
            )

    def _time_first_token(self, pieces: Iterator[TextPiece]) -> Iterator[TextPiece]:
        """Yields the same pieces; adds the time of the model's first token to the report."""
        for piece in pieces:
            self.report.seconds.setdefault("first_token", time.perf_counter() - self.started)
            yield piece
