"""KoboldAI's method: read each whole tensor; transpose, reshape and split it on the host."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open

from benchmarks.loaders.common import LoadResult, device_bytes, files, split_axis
from mtj_loader import plan as make_plan
from mtj_loader.loading.verify import verify


def load(folder: Path, mesh: Mesh) -> LoadResult:
    """Loads every tensor in MTJ's shape [n, …]."""
    shards = mesh.shape["mp"]
    placed = NamedSharding(mesh, PartitionSpec("mp"))
    arrays: dict[str, jax.Array] = {}
    for path in files(folder):
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 -- not a dict
                array = _shards(name, file.get_tensor(name), shards)
                arrays[name] = jax.device_put(array, placed)
    jax.block_until_ready(arrays)
    return LoadResult(partial(device_bytes, arrays), lambda: _check(folder, mesh, arrays))


def _shards(name: str, whole: np.ndarray, shards: int) -> np.ndarray:
    """The shards [n, …] of one tensor, in Haiku's order."""
    axis = split_axis(name)
    if whole.ndim == 2 and not name.endswith("embed_in.weight"):
        whole, axis = whole.T, None if axis is None else 1 - axis
    if name.endswith(("attention.dense.bias", "dense_4h_to_h.bias")):
        whole = (whole.astype(np.float32) / np.float32(shards)).astype(whole.dtype)
    if axis is None:
        return np.stack([whole] * shards)
    return np.stack(np.split(whole, shards, axis))


def _check(folder: Path, mesh: Mesh, arrays: dict[str, jax.Array]) -> int:
    plan = make_plan(folder, mesh)
    params: dict[str, dict[str, jax.Array]] = {}
    for param in plan.params:
        array = arrays[param.view.records[0].name]
        params.setdefault(param.spec.path, {})[param.spec.param] = array
    return verify(plan, params)
