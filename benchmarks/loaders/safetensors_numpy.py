"""safetensors' own reader for numpy, then `jax.device_put` with a NamedSharding per tensor."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import load_file

from benchmarks.loaders.common import LoadResult, check_equal, device_bytes, files, sharding


def load(folder: Path, mesh: Mesh) -> LoadResult:
    """Loads every tensor in torch's shape; host memory holds one file at a time."""
    arrays: dict[str, jax.Array] = {}
    for path in files(folder):
        tensors = load_file(path)
        placed = {name: sharding(name, mesh) for name in tensors}
        arrays |= jax.block_until_ready(jax.device_put(tensors, placed))
        del tensors
    return LoadResult(
        partial(device_bytes, arrays),
        lambda: check_equal(folder, lambda name: np.asarray(arrays[name])),
    )
