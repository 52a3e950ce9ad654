"""The floor: two threads read the files into fresh memory and do nothing else.

On the same machine, no loader whose result is private, writable memory can be faster.
"""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from benchmarks.loaders.common import LoadResult, files

_PIECE_BYTES = 8 << 20  # four huge pages; 2 to 64 MiB are equally fast
_THREADS = 2


def load(folder: Path, mesh: Mesh) -> LoadResult:
    """Reads every file into memory; the mesh is not used."""
    with ThreadPoolExecutor(_THREADS) as pool:
        buffers = [_read(path, pool) for path in files(folder)]
    total = sum(buffer.size for buffer in buffers)
    return LoadResult(lambda: total, lambda: _check(folder, buffers), total)


def _read(path: Path, pool: ThreadPoolExecutor) -> np.ndarray:
    size = path.stat().st_size
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = np.frombuffer(memory, np.uint8)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        list(pool.map(lambda at: _fill(descriptor, buffer, at), range(0, size, _PIECE_BYTES)))
    finally:
        os.close(descriptor)
    return buffer


def _fill(descriptor: int, buffer: np.ndarray, start: int) -> None:
    piece = buffer[start : start + _PIECE_BYTES]
    if os.preadv(descriptor, [piece], start) != piece.size:
        raise OSError("short read")


def _check(folder: Path, buffers: list[np.ndarray]) -> int:
    for path, buffer in zip(files(folder), buffers, strict=True):
        if not np.array_equal(np.memmap(path, np.uint8, "r"), buffer):
            raise AssertionError(f"{path.name} differs from the file")
    return sum(buffer.size for buffer in buffers)
