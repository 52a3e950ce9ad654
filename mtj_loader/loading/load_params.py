"""Loading: a plan and a mesh in, parameters on devices and a report out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import jax
from jax.sharding import Mesh

from mtj_loader.distributed.hosts import SINGLE_HOST, Hosts
from mtj_loader.errors import MeshError
from mtj_loader.loading.buffers import Buffers
from mtj_loader.loading.compare_copies import compare_carried, compare_tied
from mtj_loader.loading.garbage import no_collections
from mtj_loader.loading.load_failure import clean_load_failure
from mtj_loader.loading.load_report import LoadReport, make_report, with_totals
from mtj_loader.loading.memory_check import check_memory
from mtj_loader.loading.placement import Params
from mtj_loader.loading.reshard import compiling, reshard
from mtj_loader.loading.stream import Streamer
from mtj_loader.lora.adapter import Adapter
from mtj_loader.lora.merge import AdaptedParam, merge_all
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.topology import topology
from mtj_loader.storage.base import check_unchanged

_LOOK_SECONDS = 0.5  # a look takes well under a millisecond a file


@clean_load_failure()
@no_collections()
def load_params(
    plan: LoadPlan,
    mesh: Mesh,
    *,
    plan_seconds: float = 0.0,
    progress: Callable[[int], None] = lambda done: None,
    buffers: Buffers | None = None,
    hosts: Hosts = SINGLE_HOST,
) -> tuple[Params, LoadReport]:
    """Executes a plan on this host.

    Args:
      plan: what to load.
      mesh: devices with Auto axes dp and mp, of the plan's sizes.
      plan_seconds: how long planning took, for the report.
      progress: called with the bytes read so far.
      buffers: how shards get to their devices; by default what the backend does best.
      hosts: who loads with this one.

    Raises:
      MeshError: the mesh is not the one that was planned for.
      CheckpointError: a file changed, is truncated or gone; weights are not finite; a tied copy
        differs.
      MachineError: memory, storage or a device failed.
      HostError: another host did.
    """
    with hosts.phase("read"):
        _check_ready(plan, mesh)
        begun = time.perf_counter()
        streamer = Streamer(plan.base, mesh, _watched(plan, hosts, progress), buffers)
        with compiling(plan.base, mesh):
            params = streamer.run()
        tally, threads, device_seconds = streamer.tally, streamer.threads, streamer.device_seconds
        del streamer  # and its staging memory
    exchanging = time.perf_counter()
    with hosts.phase("exchange"):
        reshard(params, plan.base, mesh, hosts)
    exchanged = time.perf_counter()
    with hosts.phase("finish"):
        params, adapter_bytes = _merge_adapters(params, plan, mesh, donate=True)
        params = hosts.wait_until_ready(params)
        tally.bytes_read += adapter_bytes + _compare(plan)
        _check_files(plan)
    seconds = {
        "plan": plan_seconds,
        "load": time.perf_counter() - begun,
        "device": device_seconds,
        "exchange": exchanged - exchanging,
    }
    report = make_report(plan, jax.process_index(), tally, seconds, threads)
    return params, with_totals(report, hosts)


@clean_load_failure()
def adapt_params(params: Params, old: LoadPlan, new: LoadPlan, mesh: Mesh) -> Params:
    """Adds to loaded parameters, which stay as they are, what a plan has over theirs.

    Args:
      params: as `old` has them.
      old: the plan that they were loaded by.
      new: the same with more adapters.
      mesh: where they lie.

    Raises:
      VerifyError: a base weight that an adapter carries differs from the checkpoint's.
      CheckpointError, MachineError: as `load_params`.
    """
    before = {param.spec: len(param.terms) for param in old.params}
    new = replace(
        new,
        params=tuple(replace(p, terms=p.terms[before[p.spec] :]) for p in new.params),
        comparisons=(),
        carried=new.carried[len(old.carried) :],
    )
    if new.carried:
        _check_base(new)
        _compare(new)
        _check_base(new)
    merged, _ = _merge_adapters(params, new, mesh, donate=False)
    _check_adapters(new.adapters[len(old.adapters) :])
    return merged


def _merge_adapters(
    params: Params, plan: LoadPlan, mesh: Mesh, *, donate: bool
) -> tuple[Params, int]:
    """Adds the plan's low-rank terms; returns the parameters and the bytes read."""
    adapted = [
        AdaptedParam(param.spec, param.terms, param.dtype, param.view.records[0].name)
        for param in plan.adapted
    ]
    numbers = topology(mesh).shards_of(jax.process_index())
    memory_bytes = plan.options.host_memory_bytes
    return merge_all(params, adapted, mesh, numbers, memory_bytes, donate=donate)


def _check_ready(plan: LoadPlan, mesh: Mesh) -> None:
    """What can be known before reading."""
    if jax.process_index() not in topology(mesh).host_ids:
        what = "the mesh has no device of this host"
        hint = "all hosts that join take part; start fewer, or make the mesh larger"
        raise MeshError(what, found=f"host {jax.process_index()}", hint=hint)
    if topology(mesh) != plan.topology:
        wanted, found = (f"{t}, hosts {t.hosts}" for t in (plan.topology, topology(mesh)))
        raise MeshError("the plan is for another mesh", expected=wanted, found=found)
    plan.options.check()
    check_memory(plan.base, mesh)
    _check_files(plan)


def _watched(
    plan: LoadPlan, hosts: Hosts, progress: Callable[[int], None]
) -> Callable[[int], None]:
    """Looks, whenever progress is shown, at the other hosts and, now and then, at the files.

    Not at those in a store: each of its answers says which version it is of.
    """
    must_check_files = not plan.checkpoint.storage.checks_versions
    looked = time.monotonic()

    def advance(done: int) -> None:
        nonlocal looked
        hosts.check()
        if must_check_files and time.monotonic() - looked > _LOOK_SECONDS:
            _check_files(plan)
            looked = time.monotonic()
        progress(done)

    return advance


def _compare(plan: LoadPlan) -> int:
    """Compares copies of weights with what they are copies of, on one host; returns bytes read."""
    if jax.process_index() != plan.topology.host_ids[0]:
        return 0
    storage = plan.checkpoint.storage
    tied = compare_tied(storage, plan.comparisons, plan.options.host_memory_bytes)
    return tied + sum(compare_carried(storage, pair) for pair in plan.carried)


def _check_files(plan: LoadPlan) -> None:
    """The files are still those whose headers the plan was made from."""
    _check_base(plan)
    _check_adapters(plan.adapters)


def _check_base(plan: LoadPlan) -> None:
    check_unchanged(plan.checkpoint.storage, *plan.checkpoint.index.files.values())


def _check_adapters(adapters: Iterable[Adapter]) -> None:
    for adapter in adapters:
        check_unchanged(adapter.storage, adapter.stamp)
