"""Meshes of a Cloud TPU slice's devices, which need not exist."""

from __future__ import annotations

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from mtj_loader.errors import DeviceError
from mtj_loader.planning.topology import AXES
from mtj_loader.planning.tpu_targets import Target


def slice_mesh(target: Target, dp: int, mp: int) -> Mesh:
    """A mesh of the first dp·mp devices of a slice; needs libtpu.

    Raises:
      DeviceError: the slice has fewer devices.
    """
    devices = target.slice.devices
    if dp * mp > devices:
        what = f"the mesh dp={dp},mp={mp} needs more devices than the slice has"
        raise DeviceError(what, expected=dp * mp, found=f"{devices} ({target.slice.name})")
    topology = topologies.get_topology_desc(
        platform="tpu",
        topology_name=target.topology,
        chips_per_host_bounds=target.host_bounds,
        **target.settings,
    )
    grid = np.array(topology.devices[: dp * mp]).reshape(dp, mp)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto, AxisType.Auto))
