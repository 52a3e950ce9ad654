"""What all measured loaders share: their result, and how each tensor is split."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclass(frozen=True)
class LoadResult:
    """The result of one loader.

    Attributes:
      parameter_bytes: returns the memory of the parameters on all devices together.
      check: compares every byte with the files; returns the number of bytes compared.
      bytes_read: the loader's own count; None if it has none.
      details: other results to keep, as JSON types.
    """

    parameter_bytes: Callable[[], int]
    check: Callable[[], int]
    bytes_read: int | None = None
    details: Mapping[str, object] | None = None


# The axis of a tensor, in torch's shape, that is split over the mesh; other tensors are replicated.
_SPLIT_AXIS = {
    "embed_in.weight": 0,
    "embed_out.weight": 0,
    "query_key_value.weight": 0,
    "query_key_value.bias": 0,
    "dense_h_to_4h.weight": 0,
    "dense_h_to_4h.bias": 0,
    "attention.dense.weight": 1,
    "dense_4h_to_h.weight": 1,
}


def split_axis(name: str) -> int | None:
    """The split axis of a tensor; None if every device holds all of it."""
    return next((axis for end, axis in _SPLIT_AXIS.items() if name.endswith(end)), None)


def sharding(name: str, mesh: Mesh) -> NamedSharding:
    """The sharding of a tensor in torch's shape."""
    axis = split_axis(name)
    return NamedSharding(mesh, PartitionSpec(*() if axis is None else (None,) * axis + ("mp",)))


def device_bytes(arrays: object) -> int:
    """The memory of a tree of arrays on all devices together."""
    leaves = jax.tree.leaves(arrays)
    return sum(shard.data.nbytes for array in leaves for shard in array.addressable_shards)


def files(folder: Path) -> list[Path]:
    """The checkpoint's weight files, sorted."""
    return sorted(folder.glob("*.safetensors"))


def tensors(folder: Path) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    """Every tensor's name, shape and bytes, mapped from the files without any loader's code."""
    for path in files(folder):
        data = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start].tobytes()).items():
            if name != "__metadata__":
                first, stop = entry["data_offsets"]
                yield name, tuple(entry["shape"]), data[start + first : start + stop]


def check_equal(folder: Path, found: Callable[[str], np.ndarray]) -> int:
    """Compares `found(name)` with the files for every tensor; returns the bytes compared."""
    compared = 0
    for name, shape, expected in tensors(folder):
        array = found(name)
        same = array.shape == shape and np.array_equal(
            np.ascontiguousarray(array).reshape(-1).view(np.uint8), expected
        )
        if not same:
            raise AssertionError(f"{name} differs from the file")
        compared += expected.size
    return compared
