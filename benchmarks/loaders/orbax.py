"""Orbax's safetensors layout: each process reads the bytes of its own shards, in torch's shape."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from orbax.checkpoint.experimental import v1 as ocp

from benchmarks.loaders.common import LoadResult, check_equal, device_bytes, sharding, tensors


def load(folder: Path, mesh: Mesh) -> LoadResult:
    """Loads every tensor in torch's shape, with the same shardings as mtj_loader."""
    wanted = {
        name: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding(name, mesh))
        for name, shape, _ in tensors(folder)
    }
    context = ocp.Context()
    context.checkpoint_layout = ocp.options.CheckpointLayout.SAFETENSORS
    with context:
        arrays = jax.block_until_ready(ocp.load(folder, wanted))
    return LoadResult(
        partial(device_bytes, arrays),
        lambda: check_equal(folder, lambda name: np.asarray(arrays[name])),
    )
