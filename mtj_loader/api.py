"""The public face: `plan` and `load`."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from jax.sharding import AbstractMesh, Mesh

from mtj_loader.display import parse_bytes
from mtj_loader.distributed.agreement import check_same_load
from mtj_loader.distributed.host_group import DEFAULT_TIMEOUT_SECONDS, connect_hosts
from mtj_loader.distributed.hosts import SINGLE_HOST, Hosts
from mtj_loader.distributed.shared_headers import open_on_all_hosts
from mtj_loader.dtypes import DTypeName, parameter_dtype
from mtj_loader.errors import MeshError, UsageError
from mtj_loader.formats.checkpoint import Checkpoint, Headers, open_checkpoint
from mtj_loader.formats.token_ids import bos_id
from mtj_loader.generation.compilation_cache import enable_compilation_cache
from mtj_loader.generation.compile_ahead import (
    WarmUpLike,
    add_compile_times,
    compile_in_background,
    keep_common_shapes,
    read_shapes,
)
from mtj_loader.generation.prompts import PromptRules
from mtj_loader.generation.tokenizer import Tokenizer, load_tokenizer
from mtj_loader.loading.garbage import no_collections
from mtj_loader.loading.load_params import load_params
from mtj_loader.loading.progress import progress_bar
from mtj_loader.model import AdapterLike, Model, PathLike, weighted
from mtj_loader.models import usable_shards
from mtj_loader.models.forward import Forward
from mtj_loader.planning.load_plan import LoadOptions, LoadPlan
from mtj_loader.planning.planner import add_adapters, check_host_memory, make_plan, read_model
from mtj_loader.planning.topology import (
    Topology,
    as_mesh,
    make_abstract_mesh,
    make_mesh,
    parse_mesh,
    topology,
)
from mtj_loader.storage.base import closing_all


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
    stream: bool = False,
) -> LoadPlan:
    """Plans a load: every read and every target, without a byte of weights and without a device.

    Args:
      path: a folder, a .safetensors file, a URL such as gs://bucket/model, or a Hugging Face id.
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
      stream: read a Hugging Face repository by ranges and keep no file of it; docs/storage.md.

    Raises:
      UsageError: an option or a mesh that does not fit the model.
      CheckpointError, MapError: the files, or the map, are at fault.
      MachineError: the disk, the network or the number of devices is.
    """
    options = LoadOptions(
        dtype=dtype,
        transposed_linear=transposed_linear,
        expert_parallel=expert_parallel,
        host_memory_bytes=parse_bytes(host_memory),
        check_finite=check_finite,
        allow_unmapped=allow_unmapped,
        allow_nonfinite=allow_nonfinite,
    )
    where = revision, token, cache_dir, local_files_only, stream
    return _make(SINGLE_HOST, mesh, _Request(path, map, adapter, options, *where))


@dataclass(frozen=True)
class _Request:
    """What is to be loaded, from where and how; see `plan`."""

    path: PathLike
    map: PathLike | None
    adapter: AdapterLike | None
    options: LoadOptions
    revision: str | None
    token: str | None
    cache_dir: PathLike | None
    local_files_only: bool
    stream: bool

    def open(self, headers: Headers | None, commit: str | None) -> Checkpoint:
        """The checkpoint; without headers they are read, without a commit it is found."""
        return open_checkpoint(
            self.path,
            revision=commit or self.revision,
            token=self.token,
            cache_dir=self.cache_dir,
            local_files_only=self.local_files_only,
            stream=self.stream,
            headers=headers,
        )


def _make(
    hosts: Hosts, mesh: Mesh | AbstractMesh | Topology | str | None, request: _Request
) -> LoadPlan:
    """Plans a load of these hosts."""
    path, options = request.path, request.options
    check_host_memory(options.host_memory_bytes)
    parameter_dtype(options.dtype)
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise UsageError("not a checkpoint's path", key="path", found=repr(path))
    map_path = None if request.map is None else Path(request.map)
    checkpoint = open_on_all_hosts(hosts, request.open)
    wanted = _topology(mesh, checkpoint, map_path)
    with no_collections():
        made = make_plan(checkpoint, wanted, options, map_path)
    made = add_adapters(made, weighted(request.adapter))
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
    stream: bool = False,
    progress: bool = True,
    plan: LoadPlan | None = None,
    host_timeout: float = DEFAULT_TIMEOUT_SECONDS,
    warm_up: WarmUpLike = (),
    compilation_cache: bool = True,
) -> Model:
    """Loads a checkpoint onto a mesh.

    Args:
      path: a folder, a .safetensors file, a URL such as gs://bucket/model, or a Hugging Face id.
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
      stream: read a Hugging Face repository by ranges and keep no file of it; docs/storage.md.
      progress: show a progress bar where a person can see it.
      plan: what `mtj_loader.plan` made; it stands for the path and all of its options.
      host_timeout: seconds to wait for other hosts that are alive; docs/hosts.md.
      warm_up: what to compile while weights are read: a list of (batch, prompt_length) or
        (batch, prompt_length, max_new_tokens). `generate` compiles nothing then for a batch of so
        many prompts, up to that length. Or a function that gives it for the model's PromptRules.
      compilation_cache: let JAX keep compiled programs in the user's cache folder, if it is not
        told otherwise already; False leaves JAX as it is.

    Returns:
      The model, ready to run.

    Raises:
      UsageError: an option or a mesh that does not fit the model.
      CheckpointError, MapError: the files, or the map, are at fault; nothing is left behind.
      MachineError: memory, disk, network or devices are.
      HostError: another host failed, died or did not come in time.
    """
    begun = time.perf_counter()
    if (path is None) == (plan is None):
        raise UsageError("load takes either a path or a plan")
    with connect_hosts(host_timeout) as hosts:
        with hosts.phase("plan"):
            mesh = _made(mesh)
            if path is not None:
                options = LoadOptions(
                    dtype=dtype,
                    transposed_linear=transposed_linear,
                    expert_parallel=expert_parallel,
                    host_memory_bytes=parse_bytes(host_memory),
                    check_finite=check_finite,
                    allow_unmapped=allow_unmapped,
                    allow_nonfinite=allow_nonfinite,
                )
                where = revision, token, cache_dir, local_files_only, stream
                plan = _make(hosts, mesh, _Request(path, map, adapter, options, *where))
            assert plan is not None
            devices = _devices(mesh, plan)
            check_same_load(hosts, plan, devices)
        warnings = enable_compilation_cache() if compilation_cache else ()
        model = _execute(plan, devices, hosts, begun=begun, warm_up=warm_up, progress=progress)
        report = replace(model.report, warnings=(*model.report.warnings, *warnings))
        return replace(model, report=report)


def _execute(
    plan: LoadPlan, mesh: Mesh, hosts: Hosts, *, begun: float, warm_up: WarmUpLike, progress: bool
) -> Model:
    """Loads what is planned; compiles for generation meanwhile."""
    plan_seconds = time.perf_counter() - begun
    with hosts.phase("prepare"), plan.checkpoint.storage:
        tokenizer = load_tokenizer(plan.checkpoint.tokenizer_files, plan.model_type)
        dtype = parameter_dtype(plan.options.dtype)
        forward = Forward(plan.config, mesh, plan.options.transposed_linear, dtype)
        shapes = read_shapes(warm_up, _rules(plan, tokenizer), mesh.shape["dp"])
    needed = plan.host_bytes(jax.process_index())
    with compile_in_background(forward, plan, shapes) as first_compiled:
        with closing_all(*plan.storages), progress_bar(needed, shown=progress) as advance:
            params, report = load_params(
                plan, mesh, plan_seconds=plan_seconds, progress=advance, hosts=hosts
            )
        loaded = time.perf_counter()
        compiled = keep_common_shapes(first_compiled(), hosts)
    report = add_compile_times(report, compiled, loaded)
    return Model(params, plan.config, mesh, tokenizer, report, plan, forward, compiled, begun)


def _rules(plan: LoadPlan, tokenizer: Tokenizer | None) -> PromptRules:
    """What the model will accept as a prompt."""
    config, checkpoint = plan.config, plan.checkpoint
    bos = bos_id(checkpoint.config, checkpoint.generation_config)
    return PromptRules(config.vocab_size, config.max_positions, tokenizer, bos)


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
    return topology(make_mesh(f"mp={usable_shards(config, len(jax.devices()))[-1]}"))


def _made(mesh: Mesh | str | None) -> Mesh | str | None:
    """The mesh that a text stands for; without the devices for it, the plan may find worse."""
    if not isinstance(mesh, str):
        return mesh
    dp, mp = parse_mesh(mesh)
    return make_mesh(mesh) if dp * mp <= len(jax.devices()) else mesh


def _devices(mesh: Mesh | str | None, plan: LoadPlan) -> Mesh:
    """The devices to load onto: those given, those planned for, or the first that there are."""
    given = mesh if isinstance(mesh, Mesh) else plan.mesh
    return make_mesh(str(plan.topology)) if given is None else as_mesh(given)
