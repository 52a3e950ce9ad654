"""Whether this machine is a Cloud TPU's, found out without the network and without JAX."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

_CHIPS = ("accel[0-9]*", "vfio/[0-9]*")  # device files of v2 to v4, and of v5e and later


def on_cloud_tpu() -> bool:
    """There are TPU chips, the library that drives them, and nobody told JAX to use others."""
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    has_chips = any(True for pattern in _CHIPS for _ in Path("/dev").glob(pattern))
    return "tpu" in platforms.split(",") and has_chips and find_spec("libtpu") is not None
