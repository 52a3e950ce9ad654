"""Loading: a plan and a mesh in, parameters on devices and a report out."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from mtj_loader.checkpoint.storage import check_unchanged
from mtj_loader.errors import MeshError
from mtj_loader.loading.buffers import Buffers
from mtj_loader.loading.merge import merge_all
from mtj_loader.loading.place import Params
from mtj_loader.loading.plan import LoadPlan
from mtj_loader.loading.planner import check_host_memory
from mtj_loader.loading.report import LoadReport, make_report
from mtj_loader.loading.stream import Streamer
from mtj_loader.loading.topology import topology
from mtj_loader.loading.verify import compare_carried, compare_tied


def load_params(
    plan: LoadPlan,
    mesh: Mesh,
    *,
    plan_seconds: float = 0.0,
    progress: Callable[[int], None] = lambda done: None,
    buffers: Buffers | None = None,
) -> tuple[Params, LoadReport]:
    """Executes a plan on this host.

    Args:
      plan: what to load.
      mesh: devices with Auto axes dp and mp, of the plan's sizes.
      plan_seconds: how long planning took, for the report.
      progress: called with the bytes read so far.
      buffers: how shards get to their devices; by default what the backend does best.

    Raises:
      MeshError: the mesh is not the one that was planned for.
      CheckpointError: a file changed, is truncated or gone; weights are not finite; a tied copy
        differs.
      MachineError: memory, storage or a device failed.
    """
    if topology(mesh) != plan.topology:
        raise MeshError(
            "the plan is for another mesh", expected=plan.topology, found=topology(mesh)
        )
    check_host_memory(plan.options.host_memory_bytes)
    _check_files(plan)
    begun = time.perf_counter()
    streamer = Streamer(plan.base, mesh, progress, buffers)
    params = streamer.run()
    tally = streamer.tally
    params = jax.block_until_ready(merge_all(params, plan.adapted, mesh, donate=True))
    tally.bytes_read += plan.adapter_bytes(streamer.host)
    if streamer.host == plan.topology.host_ids[0]:
        storage = plan.checkpoint.storage
        tally.bytes_read += sum(compare_tied(storage, pair) for pair in plan.comparisons)
        tally.bytes_read += sum(compare_carried(storage, pair) for pair in plan.carried)
    _check_files(plan)
    seconds = {
        "plan": plan_seconds,
        "load": time.perf_counter() - begun,
        "device": streamer.device_seconds,
    }
    return params, make_report(plan, streamer.host, tally, seconds, streamer.threads)


def _check_files(plan: LoadPlan) -> None:
    """The files are still those whose headers the plan was made from."""
    for stamp in plan.checkpoint.index.files.values():
        check_unchanged(plan.checkpoint.storage, stamp)
    for adapter in plan.adapters:
        check_unchanged(adapter.storage, adapter.stamp)
