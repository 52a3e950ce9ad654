"""What all contenders have in common: their result, and the table of how tensors are split."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclass(frozen=True)
class Loaded:
    """What a contender loaded.

    Attributes:
      parameter_bytes: gives the memory that the parameters take, on all devices together.
      check: compares every byte with the files; returns how many it compared.
      bytes_read: what the loader itself counted; None where it does not count.
      details: more that is worth keeping, in JSON types.
    """

    parameter_bytes: Callable[[], int]
    check: Callable[[], int]
    bytes_read: int | None = None
    details: Mapping[str, object] | None = None


# Which axis of a tensor, as torch stores it, is split over the mesh; what is not here is copied.
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
    """The split axis of a tensor, None for one that every device holds whole."""
    return next((axis for end, axis in _SPLIT_AXIS.items() if name.endswith(end)), None)


def sharding(name: str, mesh: Mesh) -> NamedSharding:
    """How a tensor in torch's shape lies on the mesh."""
    axis = split_axis(name)
    return NamedSharding(mesh, PartitionSpec(*() if axis is None else (None,) * axis + ("mp",)))


def device_bytes(arrays: object) -> int:
    """Memory of a tree of arrays on all devices together."""
    leaves = jax.tree.leaves(arrays)
    return sum(shard.data.nbytes for array in leaves for shard in array.addressable_shards)


def files(folder: Path) -> list[Path]:
    """The checkpoint's weight files in order."""
    return sorted(folder.glob("*.safetensors"))


def tensors(folder: Path) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    """Every tensor's name, shape and bytes, mapped from the files by no loader's code."""
    for path in files(folder):
        data = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start].tobytes()).items():
            if name != "__metadata__":
                first, stop = entry["data_offsets"]
                yield name, tuple(entry["shape"]), data[start + first : start + stop]


def check_equal(folder: Path, found: Callable[[str], np.ndarray]) -> int:
    """Compares what `found` gives for every tensor with the files; returns the bytes compared."""
    compared = 0
    for name, shape, expected in tensors(folder):
        array = found(name)
        same = array.shape == shape and np.array_equal(
            np.ascontiguousarray(array).reshape(-1).view(np.uint8), expected
        )
        if not same:
            raise AssertionError(f"{name} is not as in the file")
        compared += expected.size
    return compared
