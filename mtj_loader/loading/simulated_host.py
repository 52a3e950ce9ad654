"""Simulates one host of a pod: loads its part of a plan onto virtual devices of this machine.

It reads, converts and places what the real host would if hosts exchanged nothing: every byte that
its devices hold. Hosts that are simulated one after another cannot exchange anything.
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


def load_as_host(
    plan: LoadPlan, host: int, progress: Callable[[int], None] = lambda done: None
) -> tuple[Params, LoadReport]:
    """Loads the part of one host.

    Args:
      plan: for the whole mesh.
      host: the process index of a host in the mesh; this machine needs as many devices as it has.
      progress: called with the bytes read so far.

    Returns:
      `params[module][param]`, with only that host's shards, and the load report.

    Raises:
      MeshError, UsageError: see `plan_for_host`.
      DeviceError: this machine has too few devices.
      CheckpointError, MachineError: see `load_params`.
    """
    local = plan_for_host(plan, host)
    with plan.checkpoint.storage:
        return load_params(local, make_mesh(str(local.topology)), progress=progress)


def plan_for_host(plan: LoadPlan, host: int) -> LoadPlan:
    """The plan of one host: its rows and columns of the mesh, as a mesh of one process.

    Parameters keep the number of shards of the whole plan, and are divided by it.

    Raises:
      MeshError: the host's devices are not a rectangle of the mesh.
      UsageError: the mesh has no such host, or the plan has adapters.
    """
    hosts = plan.topology.host_ids
    if host not in hosts:
        expected = f"one of {number_set(hosts)}"
        raise UsageError("the mesh has no such host", key="host", expected=expected, found=host)
    if plan.adapters:
        raise UsageError("a simulated host cannot merge adapters", key="adapter")
    rows = [row for row in plan.topology.hosts if host in row]
    numbers = plan.topology.shards_of(host)
    if any(row[j] != host for row in rows for j in numbers):
        what = f"host {host} cannot be simulated: its devices are not a rectangle of the mesh"
        raise MeshError(what, key="hosts", found=f"{len(hosts)} hosts on {plan.topology}")
    return replace(
        plan,
        topology=Topology(((0,) * len(numbers),) * len(rows)),
        params=tuple(
            replace(param, shards=tuple(param.shards[j] for j in numbers)).without_exchange
            for param in plan.params
        ),
        comparisons=plan.comparisons if host == hosts[0] else (),  # as in a real load
        mesh=None,
    )
