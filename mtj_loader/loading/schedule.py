"""The reads of one parameter on one host: straight into place, or by panels through scratch memory.

A schedule follows from layouts alone, so layers that look alike share one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mtj_loader.loading.copies import Copy, clip, runs, shard_copies
from mtj_loader.weights.view import Layout

PANEL_BYTES = 1 << 20  # what is read at a time stays in the second-level cache until it is copied
STRAIGHT_BYTES = 8 << 20  # pieces of a straight read: small enough to share among threads
_LEAST_STRAIGHT_BYTES = 64 << 10  # below, one panel for all shards costs fewer system calls


@dataclass(frozen=True, slots=True)
class Step:
    """One unit of reading. Numbers count elements of the record `source`.

    Attributes:
      source: which of the view's records.
      runs: the ranges to read, in order; all lie within one panel's length of the first.
      copies: (which distinct shard, what to copy there) for each part of the panel.
      straight: the one run goes where the one copy says, with no scratch memory between.
    """

    source: int
    runs: tuple[tuple[int, int], ...]
    copies: tuple[tuple[int, Copy], ...]
    straight: bool

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
    shards: tuple[Layout, ...], itemsize: int, may_read_straight: bool
) -> tuple[Step, ...]:
    """The steps that fill some distinct shards of one parameter, each source element read once.

    Args:
      shards: the distinct layouts that this host's devices hold.
      itemsize: bytes per element in the file.
      may_read_straight: no element changes on the way, so bytes may go from file to buffer.
    """
    copies = [(i, copy) for i, shard in enumerate(shards) for copy in shard_copies(shard).copies]
    steps: list[Step] = []
    for source in sorted({copy.source for _, copy in copies}):
        mine = [(i, copy) for i, copy in copies if copy.source == source]
        straight = [c for c in mine if may_read_straight and _goes_straight(c[1], mine, itemsize)]
        for i, copy in straight:
            steps += _straight_steps(i, copy, STRAIGHT_BYTES // itemsize)
        steps += _panel_steps(source, [c for c in mine if c not in straight], itemsize)
    return tuple(steps)


def _goes_straight(copy: Copy, all_copies: list[tuple[int, Copy]], itemsize: int) -> bool:
    """Whether a copy is one long run that no other copy needs too."""
    if not copy.is_run or copy.size * itemsize < _LEAST_STRAIGHT_BYTES:
        return False
    return sum(c.src < copy.stop and copy.src < c.stop for _, c in all_copies) == 1


def _straight_steps(shard: int, copy: Copy, length: int) -> Iterator[Step]:
    for start in range(copy.src, copy.stop, length):
        stop = min(start + length, copy.stop)
        for part in clip(copy, start, stop):
            yield Step(copy.source, ((start, stop),), ((shard, part),), straight=True)


def _panel_steps(source: int, copies: list[tuple[int, Copy]], itemsize: int) -> Iterator[Step]:
    needed = runs(tuple(copy for _, copy in copies))
    if not len(needed):
        return
    length = _panel_length([copy for _, copy in copies], PANEL_BYTES // itemsize)
    first, last = int(needed[0, 0]), int(needed[-1, 1])
    for start in range(first, last, length):
        stop = min(start + length, last)
        inside = _cut(needed, start, stop)
        if inside:
            parts = tuple((i, part) for i, c in copies for part in clip(c, start, stop))
            yield Step(source, inside, parts, straight=False)


def _panel_length(copies: list[Copy], most: int) -> int:
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
