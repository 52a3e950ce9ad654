"""Loads what a plan says onto a mesh; returns the parameters and a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import jax
from jax.sharding import Mesh

from mtj_loader.distributed.hosts import SINGLE_HOST, Hosts
from mtj_loader.errors import MeshError
from mtj_loader.loading.buffers import Buffers
from mtj_loader.loading.compare_copies import compare_base_weight, compare_tied
from mtj_loader.loading.load_failure import release_on_failure, translate_errors
from mtj_loader.loading.load_report import LoadReport, make_report, with_totals
from mtj_loader.loading.memory_check import check_memory
from mtj_loader.loading.placement import Params
from mtj_loader.loading.process_memory import no_garbage_collection
from mtj_loader.loading.reshard import precompile, reshard
from mtj_loader.loading.stream import Streamer
from mtj_loader.lora.adapter import Adapter
from mtj_loader.lora.merge import AdaptedParam, merge_all
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.topology import topology
from mtj_loader.storage.base import check_unchanged

_CHECK_SECONDS = 0.5  # between checks of the files, which take well under 1 ms per file


@translate_errors()
@no_garbage_collection()
def load_params(
    plan: LoadPlan,
    mesh: Mesh,
    *,
    plan_seconds: float = 0.0,
    progress: Callable[[int], None] = lambda done: None,
    buffers: Buffers | None = None,
    hosts: Hosts = SINGLE_HOST,
) -> tuple[Params, LoadReport]:
    """Executes this host's part of a plan.

    Args:
      plan: what to load.
      mesh: devices with Auto axes dp and mp, as planned.
      plan_seconds: the time that planning took, for the report.
      progress: called with the bytes read so far.
      buffers: the memory policy; by default the one for the mesh's backend.
      hosts: the hosts of the mesh.

    Raises:
      MeshError: the plan is for another mesh.
      CheckpointError: a file changed, is truncated or missing; weights are not finite; a tied copy
        differs.
      MachineError: memory, storage or a device failed.
      HostError: another host failed.
    """
    params: Params = {}
    with release_on_failure(params):
        with hosts.phase("read"):
            _check_ready(plan, mesh)
            as_read = plan.as_read
            started = time.perf_counter()
            streamer = Streamer(as_read, mesh, _with_checks(progress, plan, hosts), buffers)
            with precompile(as_read, mesh):
                params |= streamer.run()
            stats, threads, placing = streamer.stats, streamer.threads, streamer.device_seconds
            del streamer  # frees the staging memory
        read = time.perf_counter()
        with hosts.phase("exchange"):
            reshard(params, as_read, mesh, hosts)
        exchanged = time.perf_counter()
        with hosts.phase("finish"):
            stats.bytes_read += _merge_adapters(params, plan, mesh, donate=True)
            hosts.wait_until_ready(params)
            stats.bytes_read += _compare(plan)
            _check_files(plan)
    seconds = {
        "plan": plan_seconds,
        "load": time.perf_counter() - started,
        "device": placing,
        "exchange": exchanged - read,
    }
    report = make_report(plan, jax.process_index(), stats, seconds, threads)
    return params, with_totals(report, hosts)


@translate_errors()
def adapt_params(params: Params, old: LoadPlan, new: LoadPlan, mesh: Mesh) -> Params:
    """Merges more adapters into loaded parameters; does not change these, but returns new ones.

    Args:
      params: loaded with `old`.
      old: the plan of the parameters.
      new: the same plan with more adapters.
      mesh: their devices.

    Raises:
      VerifyError: a base weight in an adapter differs from the checkpoint.
      CheckpointError, MachineError: see `load_params`.
    """
    before = {param.spec: len(param.terms) for param in old.params}
    new = replace(
        new,
        params=tuple(replace(p, terms=p.terms[before[p.spec] :]) for p in new.params),
        comparisons=(),
        base_weights=new.base_weights[len(old.base_weights) :],
    )
    if new.base_weights:
        _check_base(new)
        _compare(new)
        _check_base(new)
    merged = {module: dict(arrays) for module, arrays in params.items()}
    with release_on_failure(merged):
        _merge_adapters(merged, new, mesh, donate=False)
        _check_adapters(new.adapters[len(old.adapters) :])
    return merged


def _merge_adapters(params: Params, plan: LoadPlan, mesh: Mesh, *, donate: bool) -> int:
    """Adds the plan's low-rank terms to the parameters in the tree; returns the bytes read."""
    adapted = [
        AdaptedParam(param.spec, param.terms, param.dtype, param.view.records[0].name)
        for param in plan.adapted
    ]
    numbers = topology(mesh).shards_of(jax.process_index())
    memory_bytes = plan.options.host_memory_bytes
    return merge_all(params, adapted, mesh, numbers, memory_bytes, donate=donate)


def _check_ready(plan: LoadPlan, mesh: Mesh) -> None:
    """Finds errors that can be found before reading."""
    if jax.process_index() not in topology(mesh).host_ids:
        what = "the mesh has no device of this host"
        hint = "every host must have devices in the mesh; start fewer hosts or use a larger mesh"
        raise MeshError(what, found=f"host {jax.process_index()}", hint=hint)
    if topology(mesh) != plan.topology:
        wanted, found = (f"{t}, hosts {t.hosts}" for t in (plan.topology, topology(mesh)))
        raise MeshError("the plan is for another mesh", expected=wanted, found=found)
    plan.options.check()
    check_memory(plan.as_read, mesh)
    _check_files(plan)


def _with_checks(
    progress: Callable[[int], None], plan: LoadPlan, hosts: Hosts
) -> Callable[[int], None]:
    """Adds checks to `progress`: of the other hosts and, every _CHECK_SECONDS, of the files.

    Files need no checks if the storage checks their version with every read.
    """
    must_check_files = not plan.checkpoint.storage.checks_versions
    checked = time.monotonic()

    def check_and_report(done: int) -> None:
        nonlocal checked
        hosts.check()
        if must_check_files and time.monotonic() - checked > _CHECK_SECONDS:
            _check_files(plan)
            checked = time.monotonic()
        progress(done)

    return check_and_report


def _compare(plan: LoadPlan) -> int:
    """On one host, compares copies of weights with their originals; returns the bytes read."""
    if jax.process_index() != plan.topology.host_ids[0]:
        return 0
    storage = plan.checkpoint.storage
    tied = compare_tied(storage, plan.comparisons, plan.options.host_memory_bytes)
    return tied + sum(compare_base_weight(storage, pair) for pair in plan.base_weights)


def _check_files(plan: LoadPlan) -> None:
    """Raises CheckpointError if a file changed since its header was read."""
    _check_base(plan)
    _check_adapters(plan.adapters)


def _check_base(plan: LoadPlan) -> None:
    check_unchanged(plan.checkpoint.storage, *plan.checkpoint.index.files.values())


def _check_adapters(adapters: Iterable[Adapter]) -> None:
    for adapter in adapters:
        check_unchanged(adapter.storage, adapter.file)
