"""The public face: `plan` and `load`."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import jax
from jax.sharding import AbstractMesh, Mesh

from mtj_loader.checkpoint.source import Checkpoint, open_checkpoint
from mtj_loader.display import parse_bytes
from mtj_loader.dtypes import DTypeName, parameter_dtype
from mtj_loader.errors import MeshError, UsageError
from mtj_loader.generation.tokenizer import load_tokenizer
from mtj_loader.loading.load import load_params
from mtj_loader.loading.plan import LoadOptions, LoadPlan
from mtj_loader.loading.planner import add_adapters, check_host_memory, make_plan, read_model
from mtj_loader.loading.progress import progress_bar
from mtj_loader.loading.topology import Topology, as_mesh, make_abstract_mesh, make_mesh, topology
from mtj_loader.model import AdapterLike, Model, PathLike, weighted
from mtj_loader.models import usable_shards


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
    made = add_adapters(made, weighted(adapter))
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
