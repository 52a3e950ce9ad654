"""Host memory in which shards are assembled, and the transfer from there to the devices.

There are two policies. The CPU backend adopts a new, aligned buffer without a copy; the buffer then
belongs to the parameter and is never written again. Accelerators copy from staging memory, which is
reused after the copy.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from mtj_loader.errors import DeviceError

Device = Any  # jax.Device is a variable, which is not allowed in annotations

ALIGNMENT_BYTES = 64  # the CPU backend adopts buffers with this alignment, and copies others
_HUGE_PAGE_BYTES = 2 << 20  # smaller buffers gain nothing from huge pages


class Buffers:
    """The memory between file and device; this class is the policy for CPU devices.

    Every batch gets new memory, which the CPU backend keeps as the parameter itself.

    Attributes:
      batch_bytes: how many bytes are assembled and transferred at a time.
      section_bytes: a larger block is transferred in sections of at most this size; None: never.
    """

    batch_bytes: int = 64 << 20  # large enough for huge pages, small enough to overlap with reading
    section_bytes: int | None = None

    def acquire(self, size_bytes: int) -> np.ndarray:
        """At least this much memory, uint8, aligned to ALIGNMENT_BYTES, with undefined content."""
        return allocate(size_bytes)

    def put(self, arrays: list[np.ndarray], devices: list[Device]) -> list[jax.Array]:
        """Transfers each array to its device; afterwards its memory may be released."""
        with device_errors():
            return jax.device_put(arrays, devices)

    def release(self, memory: np.ndarray) -> None:
        """Returns memory from `acquire`, which the loader no longer uses."""


class StagingBuffers(Buffers):
    """Memory that is reused as soon as it was copied to the devices.

    Args:
      batch_bytes: size of each piece of memory; a larger block is transferred in sections.
    """

    def __init__(self, batch_bytes: int) -> None:
        self.batch_bytes = self.section_bytes = batch_bytes
        self._free: list[np.ndarray] = []

    def acquire(self, size_bytes: int) -> np.ndarray:
        """See `Buffers.acquire`."""
        return self._free.pop() if self._free else allocate(max(size_bytes, self.batch_bytes))

    def put(self, arrays: list[np.ndarray], devices: list[Device]) -> list[jax.Array]:
        """See `Buffers.put`."""
        return jax.block_until_ready(super().put(arrays, devices))

    def release(self, memory: np.ndarray) -> None:
        """See `Buffers.release`."""
        self._free.append(memory)


# Batches in memory at once: one is copied to the devices, one is complete, one is read.
_STAGED_BATCHES = 3
# Most memory of one thread: a chunk of 4 MiB, its float32 form, its final form, and a tile.
SCRATCH_BYTES = 16 << 20


def buffers_for(platform: str, host_memory_bytes: int, threads: int) -> Buffers:
    """The policy for a backend; batches and scratch memory stay within `host_memory_bytes`."""
    if platform == "cpu":
        return Buffers()
    return StagingBuffers((host_memory_bytes - threads * SCRATCH_BYTES) // _STAGED_BATCHES)


def allocate(size_bytes: int) -> np.ndarray:
    """Allocates zeroed memory from the system, uint8, in huge pages if possible.

    Raises:
      MemoryError: the system has not enough.
    """
    if size_bytes < _HUGE_PAGE_BYTES:
        memory = np.zeros(size_bytes + ALIGNMENT_BYTES, np.uint8)
        return memory[-memory.ctypes.data % ALIGNMENT_BYTES :][:size_bytes]
    try:
        # Private memory: the first access to shared anonymous pages is several times slower.
        mapping = mmap.mmap(
            -1, size_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
    except (OSError, MemoryError) as error:
        raise MemoryError(f"{size_bytes:,} contiguous bytes") from error
    memory = np.frombuffer(mapping, np.uint8)
    first = -memory.ctypes.data % _HUGE_PAGE_BYTES
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Only whole huge pages: most of a last, partly used one would be wasted.
        whole_bytes = size_bytes // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
        mapping.madvise(mmap.MADV_HUGEPAGE, first, whole_bytes)
    return memory[first:][:size_bytes]


def align(size_bytes: int) -> int:
    """Rounds a size up, so that the buffer that follows is aligned too."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@contextmanager
def device_errors() -> Iterator[None]:
    """Raises DeviceError if a device refuses an allocation."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise DeviceError("a device refused an allocation", found=str(error)) from error
