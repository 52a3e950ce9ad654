"""One host of a pod that is not there: its share of a plan, on virtual devices of this machine.

What is read, copied, computed and placed is just what that host would do by itself, reading every
byte that its devices hold; hosts that are simulated one after the other exchange nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mtj_loader.errors import MeshError, UsageError
from mtj_loader.loading.load_params import load_params
from mtj_loader.loading.load_report import LoadReport
from mtj_loader.loading.placement import Params
from mtj_loader.names import number_set
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.topology import Topology, make_mesh


def load_host(
    plan: LoadPlan, host: int, progress: Callable[[int], None] = lambda done: None
) -> tuple[Params, LoadReport]:
    """Reads and places the share of one host.

    Args:
      plan: of the whole mesh.
      host: one of its hosts; it needs as many devices here as it has there.
      progress: called with the bytes read so far.

    Returns:
      `params[module][param]`, every array with that host's shards alone, and the load's report.

    Raises:
      MeshError, UsageError: as `of_host`.
      DeviceError: there are too few devices.
      CheckpointError, MachineError: as `load_params`.
    """
    mine = of_host(plan, host)
    with plan.checkpoint.storage:
        return load_params(mine, make_mesh(str(mine.topology)), progress=progress)


def of_host(plan: LoadPlan, host: int) -> LoadPlan:
    """The plan of one host alone: its rows and columns of the mesh as a mesh of one process.

    Parameters are still cut into as many shards as the plan says, and divided by as many.

    Raises:
      MeshError: the host's devices are no rectangle of the mesh.
      UsageError: there is no such host, or the plan has adapters.
    """
    hosts = plan.topology.host_ids
    if host not in hosts:
        expected = f"one of {number_set(hosts)}"
        raise UsageError("the mesh has no such host", key="host", expected=expected, found=host)
    if plan.adapters:
        raise UsageError("a simulated host merges no adapters", key="adapter")
    rows = [row for row in plan.topology.hosts if host in row]
    numbers = plan.topology.shards_of(host)
    if any(row[j] != host for row in rows for j in numbers):
        what = f"the devices of host {host} are no rectangle of the mesh, so it cannot be simulated"
        raise MeshError(what, key="hosts", found=f"{len(hosts)} hosts on {plan.topology}")
    # Parameters that are alike share their shards; so do they here, see `LoadPlan.host_bytes`.
    shards = {id(p.shards): tuple(p.shards[j] for j in numbers) for p in plan.params}
    return replace(
        plan,
        topology=Topology(((0,) * len(numbers),) * len(rows)),
        params=tuple(replace(p, shards=shards[id(p.shards)]).unshared for p in plan.params),
        comparisons=plan.comparisons if host == hosts[0] else (),  # as in a real load
        mesh=None,
    )
