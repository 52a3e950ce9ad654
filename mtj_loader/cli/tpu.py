"""Detects Cloud TPU machines without the network and without JAX."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

_CHIPS = ("accel[0-9]*", "vfio/[0-9]*")  # device files of v2 to v4, and of v5e and later


def on_cloud_tpu() -> bool:
    """Whether there are TPU chips and libtpu, and JAX is not set to use another platform."""
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    has_chips = any(True for pattern in _CHIPS for _ in Path("/dev").glob(pattern))
    return "tpu" in platforms.split(",") and has_chips and find_spec("libtpu") is not None
