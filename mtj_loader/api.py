"""The public face: `plan`, `load`, and the `Model` that `load` returns."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike

from mtj_loader.checkpoint.source import Checkpoint, open_checkpoint
from mtj_loader.display import parse_bytes
from mtj_loader.dtypes import DTypeName, parameter_dtype
from mtj_loader.errors import MeshError, UsageError
from mtj_loader.generation import generate as generation
from mtj_loader.generation.generate import Generator, Stop
from mtj_loader.generation.prompts import PromptLike, check_batch
from mtj_loader.generation.sampling import SamplingParams
from mtj_loader.generation.stopping import bos_id, eos_ids
from mtj_loader.generation.tokenizer import Tokenizer, load_tokenizer
from mtj_loader.loading.load import load_params
from mtj_loader.loading.merge import merge_all
from mtj_loader.loading.place import Params
from mtj_loader.loading.plan import LoadOptions, LoadPlan
from mtj_loader.loading.planner import (
    add_adapters,
    check_host_memory,
    make_plan,
    read_model,
)
from mtj_loader.loading.progress import progress_bar
from mtj_loader.loading.report import LoadReport
from mtj_loader.loading.topology import Topology, as_mesh, make_abstract_mesh, make_mesh, topology
from mtj_loader.models import usable_shards
from mtj_loader.models.config import ModelConfig
from mtj_loader.models.forward import Forward

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
      base: the model that adapters were added to after loading, None for others.
    """

    params: Params
    config: ModelConfig
    mesh: Mesh
    tokenizer: Tokenizer | None
    report: LoadReport
    plan: LoadPlan
    base: Model | None = None

    @cached_property
    def forward(self) -> Forward:
        """The model's compiled functions, for code that wants them one by one."""
        options = self.plan.options
        dtype = parameter_dtype(options.dtype)
        return Forward(self.config, self.mesh, options.transposed_linear, dtype)

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
        """
        plan = add_adapters(self.plan, _weighted(adapter))
        old = {param.spec: len(param.terms) for param in self.plan.params}
        new = [replace(p, terms=p.terms[old[p.spec] :]) for p in plan.adapted]
        params = merge_all(self.params, [p for p in new if p.terms], self.mesh, donate=False)
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
        changed = {param.spec for param in self.plan.adapted}
        again = replace(unadapted, params=tuple(p for p in unadapted.params if p.spec in changed))
        fresh, report = load_params(again, self.mesh)
        params = {m: arrays | fresh.get(m, {}) for m, arrays in self.params.items()}
        return replace(self, params=params, plan=unadapted, report=report)

    @cached_property
    def _generator(self) -> Generator:
        checkpoint = self.plan.checkpoint
        config = checkpoint.config, checkpoint.generation_config
        return Generator(
            self.forward, self.params, self.tokenizer, eos_ids(*config), bos_id(*config)
        )


def plan(
    path: PathLike,
    mesh: Mesh | AbstractMesh | Topology | str | None = None,
    *,
    dtype: DTypeName = "auto",
    transposed_linear: bool = False,
    expert_parallel: bool = False,
    map: PathLike | None = None,
    adapter: AdapterLike | None = None,
    host_memory: str | int = "1GiB",
    check_finite: bool = False,
    allow_unmapped: bool = False,
    allow_nonfinite: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
) -> LoadPlan:
    """Plans a load: every read and every target, without a byte of weights and without a device.

    Args:
      path: a folder, a .safetensors file, or a Hugging Face id.
      mesh: a mesh with axes dp and mp, `make_abstract_mesh(…)` for one that is not there, or a
        text such as "mp=8". None takes the largest shard count that devices and model allow.
      dtype: of the parameters; "auto" is bfloat16.
      transposed_linear: keep linear weights in torch's [out, in], the fastest to load.
      expert_parallel: deal whole experts over the shards instead of splitting each.
      map: a weight map instead of the family's own.
      adapter: a LoRA adapter's folder, or several as `[(folder, weight), …]`; merged while loading.
      host_memory: the most memory in flight between files and devices, such as "1GiB".
      check_finite: look for NaN and infinity in all weights.
      allow_unmapped: leave out tensors that the map does not know, with a warning.
      allow_nonfinite: load NaN and infinity that were found.
      revision: of a Hugging Face id: a branch, a tag or a commit.
      token: for private models; by default the one that huggingface_hub finds.
      cache_dir: where downloads are kept; by default huggingface_hub's cache.
      local_files_only: take what the cache has, and ask no server.

    Raises:
      UsageError: an option or a mesh that does not fit the model.
      CheckpointError, MapError: the files, or the map, are at fault.
      MachineError: the disk, the network or the number of devices is.
    """
    options = LoadOptions(
        dtype,
        transposed_linear,
        expert_parallel,
        parse_bytes(host_memory),
        check_finite,
        allow_unmapped,
        allow_nonfinite,
    )
    check_host_memory(options.host_memory_bytes)
    parameter_dtype(dtype)
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise UsageError("not a checkpoint's path", key="path", found=repr(path))
    checkpoint = open_checkpoint(
        path,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    map_path = None if map is None else Path(map)
    wanted = _topology(mesh, checkpoint, map_path)
    made = make_plan(checkpoint, wanted, options, map_path)
    made = add_adapters(made, _weighted(adapter))
    return replace(made, mesh=mesh if isinstance(mesh, Mesh) else None)


def load(
    path: PathLike | None = None,
    mesh: Mesh | str | None = None,
    *,
    dtype: DTypeName = "auto",
    transposed_linear: bool = False,
    expert_parallel: bool = False,
    map: PathLike | None = None,
    adapter: AdapterLike | None = None,
    host_memory: str | int = "1GiB",
    check_finite: bool = False,
    allow_unmapped: bool = False,
    allow_nonfinite: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
    progress: bool = True,
    plan: LoadPlan | None = None,
) -> Model:
    """Loads a checkpoint onto a mesh.

    Args:
      path: a folder, a .safetensors file, or a Hugging Face id.
      mesh: a mesh with axes dp and mp, or a text such as "dp=2,mp=4"; None takes the largest
        shard count that devices and model allow.
      dtype: of the parameters; "auto" is bfloat16.
      transposed_linear: keep linear weights in torch's [out, in], the fastest to load.
      expert_parallel: deal whole experts over the shards instead of splitting each.
      map: a weight map instead of the family's own.
      adapter: a LoRA adapter's folder, or several as `[(folder, weight), …]`; merged while loading.
      host_memory: the most memory in flight between files and devices, such as "1GiB".
      check_finite: look for NaN and infinity in all weights.
      allow_unmapped: leave out tensors that the map does not know, with a warning.
      allow_nonfinite: load NaN and infinity that were found.
      revision: of a Hugging Face id: a branch, a tag or a commit.
      token: for private models; by default the one that huggingface_hub finds.
      cache_dir: where downloads are kept; by default huggingface_hub's cache.
      local_files_only: take what the cache has, and ask no server.
      progress: show a progress bar where a person can see it.
      plan: what `mtj_loader.plan` made; it stands for the path and all of its options.

    Returns:
      The model, ready to run.

    Raises:
      UsageError: an option or a mesh that does not fit the model.
      CheckpointError, MapError: the files, or the map, are at fault; nothing is left behind.
      MachineError: memory, disk, network or devices are.
    """
    begun = time.perf_counter()
    if (path is None) == (plan is None):
        raise UsageError("load takes either a path or a plan")
    if path is not None:
        plan = _plan(
            path,
            mesh,
            dtype=dtype,
            transposed_linear=transposed_linear,
            expert_parallel=expert_parallel,
            map=map,
            adapter=adapter,
            host_memory=host_memory,
            check_finite=check_finite,
            allow_unmapped=allow_unmapped,
            allow_nonfinite=allow_nonfinite,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    assert plan is not None
    plan_seconds = time.perf_counter() - begun
    return _execute(plan, _devices(mesh, plan), plan_seconds, progress)


_plan = plan  # `load` has an argument of that name


def _execute(plan: LoadPlan, mesh: Mesh, plan_seconds: float, progress: bool) -> Model:
    tokenizer = load_tokenizer(plan.checkpoint.tokenizer_files, plan.model_type)
    needed = plan.host_bytes(jax.process_index())
    with plan.checkpoint.storage, progress_bar(needed, shown=progress) as advance:
        params, report = load_params(plan, mesh, plan_seconds=plan_seconds, progress=advance)
    return Model(params, plan.config, mesh, tokenizer, report, plan)


def _weighted(adapter: AdapterLike | None) -> list[tuple[PathLike, float]]:
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


def _topology(
    mesh: Mesh | AbstractMesh | Topology | str | None, checkpoint: Checkpoint, map_path: Path | None
) -> Topology:
    """The mesh to plan for; without one, a shard for every device that the model can use."""
    if isinstance(mesh, str):
        return make_abstract_mesh(mesh)
    if isinstance(mesh, Mesh | AbstractMesh | Topology):
        return topology(mesh)
    if mesh is not None:
        expected = 'a mesh, or a text such as "dp=2,mp=4"'
        raise MeshError("not a mesh", key="mesh", expected=expected, found=repr(mesh))
    _, _, config = read_model(checkpoint, map_path)
    return make_abstract_mesh(f"mp={usable_shards(config, len(jax.devices()))[-1]}")


def _devices(mesh: Mesh | str | None, plan: LoadPlan) -> Mesh:
    """The devices to load onto: those given, those planned for, or the first that there are."""
    given = mesh if isinstance(mesh, Mesh) else plan.mesh
    return make_mesh(str(plan.topology)) if given is None else as_mesh(given)
