"""The mesh as the planner sees it: dp × mp positions, and the host of each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from mtj_loader.display import counted
from mtj_loader.errors import DeviceError, MeshError

AXES = ("dp", "mp")  # replicas of the model, and shards of one replica


@dataclass(frozen=True)
class Topology:
    """A mesh, which need not exist: `hosts[i][j]` is the host of the device at dp=i, mp=j."""

    hosts: tuple[tuple[int, ...], ...]

    @property
    def dp(self) -> int:
        """Replicas of the model."""
        return len(self.hosts)

    @property
    def mp(self) -> int:
        """Shards of the model, n."""
        return len(self.hosts[0])

    @property
    def host_ids(self) -> tuple[int, ...]:
        """All hosts with devices in the mesh."""
        return tuple(sorted({host for row in self.hosts for host in row}))

    def shards_of(self, host: int) -> tuple[int, ...]:
        """The numbers of the shards that this host's devices hold, each once."""
        return tuple(j for j in range(self.mp) if any(row[j] == host for row in self.hosts))

    def device_indices_of(self, host: int) -> tuple[int, ...]:
        """This host's devices, counted row by row: index i·mp + j is dp=i, mp=j."""
        return tuple(i for i, owner in enumerate(chain(*self.hosts)) if owner == host)

    def __repr__(self) -> str:
        return f"<Topology {self} on {counted(len(self.host_ids), 'host')}>"

    def __str__(self) -> str:
        return f"dp={self.dp}, mp={self.mp}"


def make_mesh(spec: str | None = None) -> Mesh:
    """A mesh over the first dp·mp devices: `"mp=8"`, `"dp=2,mp=4"`; None takes all as mp.

    Raises:
      MeshError: the text is malformed.
      DeviceError: the mesh needs more devices than there are.
    """
    devices = jax.devices()
    dp, mp = (1, len(devices)) if spec is None else parse_mesh(spec)
    if dp * mp > len(devices):
        raise DeviceError(
            f"the mesh {spec} needs more devices than there are",
            expected=dp * mp,
            found=f"{len(devices)} ({devices[0].platform})",
            hint="--cpu-devices N, or in Python jax.config.update('jax_num_cpu_devices', N), "
            "provides N virtual CPU devices",
        )
    grid = np.array(devices[: dp * mp]).reshape(dp, mp)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def make_abstract_mesh(spec: str, hosts: int = 1) -> Topology:
    """A mesh to plan for, which need not exist; each host gets the next equal share of its devices.

    It is a `Topology`, which knows the hosts; JAX's `AbstractMesh` does not.

    Raises:
      MeshError: the text is malformed, or the hosts do not divide the devices.
    """
    dp, mp = parse_mesh(spec)
    if hosts < 1 or dp * mp % hosts:
        raise MeshError("the hosts do not divide the devices", expected=dp * mp, found=hosts)
    host_of = np.repeat(np.arange(hosts), dp * mp // hosts).reshape(dp, mp)
    return Topology(tuple(tuple(row) for row in host_of.tolist()))


def parse_mesh(spec: str) -> tuple[int, int]:
    """Parses `"dp=2,mp=4"` into (dp, mp); an omitted size is 1.

    Raises:
      MeshError: the text is malformed.
    """
    sizes = {"dp": 1, "mp": 1}
    given: set[str] = set()
    for part in spec.split(","):
        found = re.fullmatch(r"\s*(dp|mp)\s*=\s*([1-9][0-9]{0,5})\s*", part)
        if found is None:
            raise MeshError("cannot read the mesh", expected='like "dp=1,mp=8"', found=repr(spec))
        if found[1] in given:
            raise MeshError(f"the mesh names {found[1]} twice", found=repr(spec))
        given.add(found[1])
        sizes[found[1]] = int(found[2])
    return sizes["dp"], sizes["mp"]


def as_mesh(mesh: Mesh) -> Mesh:
    """The same devices as a mesh with Auto axes dp and mp.

    Meshes from `jax.make_mesh` have Explicit axes. A missing axis has size 1.

    Raises:
      MeshError: the mesh has axes other than dp and mp.
    """
    _check_axes(mesh.axis_names)
    order = [mesh.axis_names.index(name) for name in AXES if name in mesh.axis_names]
    grid = mesh.devices.transpose(order)
    shape = tuple(mesh.shape.get(name, 1) for name in AXES)
    return Mesh(grid.reshape(shape), AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def topology(mesh: Mesh | AbstractMesh | Topology) -> Topology:
    """The topology of a mesh.

    Raises:
      MeshError: the mesh has axes other than dp and mp.
    """
    if isinstance(mesh, Topology):
        return mesh
    _check_axes(mesh.axis_names)
    if isinstance(mesh, AbstractMesh):
        shape = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
        return Topology(((0,) * shape.get("mp", 1),) * shape.get("dp", 1))
    grid = as_mesh(mesh).devices
    return Topology(tuple(tuple(device.process_index for device in row) for row in grid))


def _check_axes(names: tuple[str, ...]) -> None:
    if not names or any(name not in AXES for name in names):
        raise MeshError(
            "a mesh must have the axes dp and mp", expected="dp, mp", found=", ".join(names)
        )
