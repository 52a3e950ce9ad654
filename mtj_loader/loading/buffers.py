"""Where shards are put together on the host, and how they get from there to their devices.

Two policies behind one interface. The CPU backend takes over a fresh, aligned buffer without a
copy; such a buffer is the parameter from then on and is never written again. Accelerators get a
copy from staging memory, which is used again once the copy is done.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import jax
import numpy as np

from mtj_loader.errors import DeviceError

Device = Any  # jax.Device is a variable, which no annotation may name

ALIGNMENT_BYTES = 64  # the CPU backend adopts buffers at multiples of this, and copies others
_HUGE_PAGE_BYTES = 2 << 20  # below, huge pages cannot help


class Buffers(Protocol):
    """A policy for the memory between file and device."""

    @property
    def batch_bytes(self) -> int:
        """How much is put together and handed over at a time."""
        ...

    @property
    def block_bytes(self) -> int | None:
        """A larger shard is placed in blocks of at most this; None: never."""
        ...

    def take(self, size_bytes: int) -> np.ndarray:
        """At least so much memory, uint8, aligned to ALIGNMENT_BYTES; its content is undefined."""
        ...

    def put(self, arrays: list[np.ndarray], devices: list[Device]) -> list[jax.Array]:
        """Each array on its device; what belongs to `take` may be taken again afterwards."""
        ...

    def give_back(self, slab: np.ndarray) -> None:
        """The memory of one `take` is no longer written or read by the loader."""
        ...


class AdoptedBuffers:
    """Fresh memory for every batch; the CPU backend keeps it as the parameter itself."""

    batch_bytes = 64 << 20  # large enough for huge pages, small enough to overlap with reading
    block_bytes = None

    def take(self, size_bytes: int) -> np.ndarray:
        """See `Buffers.take`."""
        return allocate(size_bytes)

    def put(self, arrays: list[np.ndarray], devices: list[Device]) -> list[jax.Array]:
        """See `Buffers.put`."""
        return _device_put(arrays, devices)

    def give_back(self, slab: np.ndarray) -> None:
        """Nothing: the arrays own it now."""


class StagingBuffers:
    """Memory that is used again as soon as its copy to the devices is done.

    Args:
      batch_bytes: size of each piece of it; a larger shard is placed in blocks.
    """

    def __init__(self, batch_bytes: int) -> None:
        self.batch_bytes = self.block_bytes = batch_bytes
        self._free: list[np.ndarray] = []

    def take(self, size_bytes: int) -> np.ndarray:
        """See `Buffers.take`."""
        return self._free.pop() if self._free else allocate(max(size_bytes, self.batch_bytes))

    def put(self, arrays: list[np.ndarray], devices: list[Device]) -> list[jax.Array]:
        """See `Buffers.put`."""
        return jax.block_until_ready(_device_put(arrays, devices))

    def give_back(self, slab: np.ndarray) -> None:
        """See `Buffers.give_back`."""
        self._free.append(slab)


# Batches that exist at once while staging: one is copied to the devices, one is ready, one is read.
_STAGED_BATCHES = 3
# At most what a thread holds: a panel of 4 MiB, its float32 form, its last form, and a tile.
SCRATCH_BYTES = 16 << 20


def buffers_for(platform: str, host_memory_bytes: int, threads: int) -> Buffers:
    """The policy for a backend, so that everything in flight stays within `host_memory_bytes`."""
    if platform == "cpu":
        return AdoptedBuffers()
    return StagingBuffers((host_memory_bytes - threads * SCRATCH_BYTES) // _STAGED_BATCHES)


def allocate(size_bytes: int) -> np.ndarray:
    """Fresh, zeroed memory from the system, uint8, in huge pages where that can be had.

    Raises:
      MemoryError: the system has no more.
    """
    if size_bytes < _HUGE_PAGE_BYTES:
        memory = np.zeros(size_bytes + ALIGNMENT_BYTES, np.uint8)
        return memory[-memory.ctypes.data % ALIGNMENT_BYTES :][:size_bytes]
    try:
        # Private memory: first touch of shared anonymous pages is several times slower.
        mapping = mmap.mmap(
            -1, size_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
    except (OSError, MemoryError) as error:
        raise MemoryError(f"{size_bytes:,} bytes in one piece") from error
    memory = np.frombuffer(mapping, np.uint8)
    first = -memory.ctypes.data % _HUGE_PAGE_BYTES
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Whole huge pages only: the end of the last one would take memory that nothing uses.
        whole_bytes = size_bytes // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
        mapping.madvise(mmap.MADV_HUGEPAGE, first, whole_bytes)
    return memory[first:][:size_bytes]


def aligned(size_bytes: int) -> int:
    """A buffer's size, rounded up so that the next one is aligned too."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@contextmanager
def device_refusals() -> Iterator[None]:
    """Turns a device's refusal of an allocation into our error."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise DeviceError("a device refused an allocation", found=str(error)) from error


def _device_put(arrays: Sequence[np.ndarray], devices: Sequence[Device]) -> list[jax.Array]:
    with device_refusals():
        return jax.device_put(list(arrays), list(devices))
