"""The reads of one parameter on one host: straight into place, or by panels through scratch memory.

A schedule follows from layouts alone, so layers that look alike share one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mtj_loader.weights.copies import Copy, clip, join_shards, runs
from mtj_loader.weights.view import Layout

CHUNK_BYTES = 1 << 20  # what is read at a time stays in the second-level cache until it is copied
# A transpose writes as much of each line of its target at once as a panel has rows; 1 MiB of them
# took 25 % longer.
_TRANSPOSED_CHUNK_BYTES = 4 << 20
DIRECT_READ_BYTES = 8 << 20  # pieces of a straight read: small enough to share among threads
_MIN_DIRECT_READ_BYTES = 64 << 10  # below, one panel for all shards costs fewer system calls


@dataclass(frozen=True, slots=True)
class Step:
    """One unit of reading. Numbers count elements of the record `source`.

    Attributes:
      source: which of the view's records.
      runs: the ranges to read, in order; all lie within one panel's length of the first.
      copies: what goes where in the buffer that holds all shards.
      straight: the one run goes where the one copy says, with no scratch memory between.
    """

    source: int
    runs: tuple[tuple[int, int], ...]
    copies: tuple[Copy, ...]
    direct: bool

    @property
    def start(self) -> int:
        """The first element read."""
        return self.runs[0][0]

    @property
    def span(self) -> int:
        """Elements from the first to the last one read, gaps included."""
        return self.runs[-1][1] - self.start

    @property
    def size(self) -> int:
        """Elements read."""
        return sum(stop - start for start, stop in self.runs)


@lru_cache(maxsize=1024)  # kinds of parameters × hosts that one process plans for
def schedule(
    shards: tuple[Layout, ...], spacing: int, itemsize: int, may_read_directly: bool
) -> tuple[Step, ...]:
    """The steps that fill some distinct shards of one parameter, each source element read once.

    Args:
      shards: the distinct layouts that this host's devices hold.
      spacing: elements from the beginning of one shard's buffer to that of the next.
      itemsize: bytes per element in the file.
      may_read_directly: no element changes on the way, so bytes may go from file to buffer.
    """
    copies = join_shards(shards, spacing)
    steps: list[Step] = []
    for source in sorted({copy.source for copy in copies}):
        mine = [copy for copy in copies if copy.source == source]
        direct = [c for c in mine if may_read_directly and _is_direct(c, mine, itemsize)]
        for copy in direct:
            steps += _direct_steps(copy, DIRECT_READ_BYTES // itemsize)
        rest = [copy for copy in mine if copy not in direct]
        transposed = may_read_directly and any(copy.is_transpose for copy in rest)
        chunk_bytes = _TRANSPOSED_CHUNK_BYTES if transposed else CHUNK_BYTES
        steps += _chunk_steps(source, rest, chunk_bytes // itemsize)
    return tuple(steps)


def _is_direct(copy: Copy, all_copies: list[Copy], itemsize: int) -> bool:
    """Whether a copy is one run that no other copy needs too, long or all there is."""
    if not copy.is_run:
        return False
    if len(all_copies) > 1 and copy.size * itemsize < _MIN_DIRECT_READ_BYTES:
        return False
    return sum(c.src < copy.stop and copy.src < c.stop for c in all_copies) == 1


def _direct_steps(copy: Copy, length: int) -> Iterator[Step]:
    for start in range(copy.src, copy.stop, length):
        stop = min(start + length, copy.stop)
        yield Step(copy.source, ((start, stop),), tuple(clip(copy, start, stop)), direct=True)


def _chunk_steps(source: int, copies: list[Copy], most: int) -> Iterator[Step]:
    needed = runs(tuple(copies))
    if not len(needed):
        return
    length = _chunk_length(copies, most)
    first, last = int(needed[0, 0]), int(needed[-1, 1])
    for start in range(first, last, length):
        stop = min(start + length, last)
        inside = _cut(needed, start, stop)
        if inside:
            parts = tuple(part for copy in copies for part in clip(copy, start, stop))
            yield Step(source, inside, parts, direct=False)


def _chunk_length(copies: list[Copy], most: int) -> int:
    """As many whole rows as fit, so that few copies are cut inside a row."""
    strides = [loop.src for copy in copies for loop in copy.loops if loop.src <= most]
    row = max(strides, default=1) or 1
    return most // row * row


def _cut(needed: np.ndarray, start: int, stop: int) -> tuple[tuple[int, int], ...]:
    """The part of sorted, disjoint ranges that lies in [start, stop)."""
    low = int(np.searchsorted(needed[:, 1], start, side="right"))
    high = int(np.searchsorted(needed[:, 0], stop, side="left"))
    inside = np.clip(needed[low:high], start, stop)
    return tuple((a, b) for a, b in inside.tolist())
