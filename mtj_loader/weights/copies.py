"""Turns a shard's layout into the runs to read and the strided copies into the shard's buffer.

All offsets and strides count elements: of the source record on one side, of the shard's row-major
buffer on the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np

from mtj_loader.parameters import Axis, ParamSpec
from mtj_loader.weights.view import ZEROS, Layout, row_major


@dataclass(frozen=True, slots=True)
class Loop:
    """One loop of a strided copy: the iterations, and the stride of each side."""

    count: int
    src: int
    dst: int


@dataclass(frozen=True, slots=True)
class Copy:
    """A strided copy from one record into a shard's buffer.

    Attributes:
      source: the index of one of the view's records.
      src: the first element read.
      dst: the element of the buffer that it is copied to.
      loops: in descending order of the `src` stride, adjacent ones merged where possible.
    """

    source: int
    src: int
    dst: int
    loops: tuple[Loop, ...]

    @property
    def stop(self) -> int:
        """One past the last source element."""
        return self.src + _extent(self.loops)

    @property
    def size(self) -> int:
        """The number of elements copied."""
        return math.prod(loop.count for loop in self.loops)

    @property
    def is_contiguous(self) -> bool:
        """Whether both sides are contiguous, so that the file can be read into the buffer."""
        return not self.loops or (
            len(self.loops) == 1 and self.loops[0].src == 1 == self.loops[0].dst
        )

    @property
    def is_transpose(self) -> bool:
        """Whether adjacent elements of the file are not adjacent in the buffer."""
        return bool(self.loops) and self.loops[-1].src == 1 and self.loops[-1].dst > 1


@dataclass(frozen=True)
class ShardCopies:
    """Everything that fills one shard: copies from records, and boxes of zeros in the buffer."""

    copies: tuple[Copy, ...]
    zeros: tuple[tuple[slice, ...], ...]


@lru_cache(maxsize=4096)  # layers share layouts; the largest known model has far fewer kinds
def shard_layouts(
    layout: Layout, groups: tuple[tuple[Axis, ...], ...], split: str | None, shards: int
) -> tuple[Layout, ...]:
    """The layout of every shard of a parameter, with one dimension per axis of `groups`.

    Merging those axes into `ParamSpec.shard_shape` is a free row-major reshape. A replicated
    parameter has n equal layouts.
    """
    layout = split_groups(layout, groups)
    if split is None:
        return (layout,) * shards
    axes = [axis for group in groups for axis in group]
    at = [axis.name for axis in axes].index(split)
    length, part = axes[at].size, axes[at].part(shards)

    def shard(j: int) -> Layout:
        first = j * length // shards
        start, stop = [0] * len(axes), list(layout.shape)
        start[at], stop[at] = first, first + part
        return layout.slice(start, stop)

    return tuple(shard(j) for j in range(shards))


def distinct_layouts(
    layout: Layout, spec: ParamSpec, shards: int, numbers: Sequence[int]
) -> tuple[Layout, ...]:
    """The distinct layouts of some of a parameter's n shards; see `shard_layouts`."""
    layouts = shard_layouts(layout, spec.groups, spec.split, shards)
    return tuple(dict.fromkeys(layouts[j] for j in numbers))


def split_groups(layout: Layout, groups: tuple[tuple[Axis, ...], ...]) -> Layout:
    """Splits every dimension into the axes of its group, unless that was already done."""
    if len(layout.shape) == sum(map(len, groups)):
        return layout
    for dim in reversed(range(len(groups))):
        layout = layout.split_axis(dim, [axis.size for axis in groups[dim]])
    return layout


@lru_cache(maxsize=65536)  # one per distinct shard: kinds of parameters × shards
def shard_copies(layout: Layout) -> ShardCopies:
    """The strided copies and the boxes of zeros of a layout's pieces."""
    strides = row_major(layout.shape)
    copies, zeros = [], []
    for piece in layout.pieces:
        if piece.source == ZEROS:
            zeros.append(tuple(slice(a, b) for a, b in zip(piece.start, piece.stop, strict=True)))
            continue
        dst = sum(a * s for a, s in zip(piece.start, strides, strict=True))
        loops = [Loop(*three) for three in zip(piece.shape, piece.strides, strides, strict=True)]
        copies.append(Copy(piece.source, piece.offset, dst, _merge_loops(loops)))
    return ShardCopies(tuple(copies), tuple(zeros))


def elements_by_source(layout: Layout) -> dict[int, int]:
    """The number of elements that a shard takes from each record; repeated ones count once."""
    counts: dict[int, int] = {}
    for piece in layout.pieces:
        if piece.source != ZEROS:
            moving = (n for n, s in zip(piece.shape, piece.strides, strict=True) if s)
            counts[piece.source] = counts.get(piece.source, 0) + math.prod(moving)
    return counts


def join_shards(shards: Sequence[Layout], spacing: int) -> tuple[Copy, ...]:
    """The copies that fill several shards in one buffer; shard i starts at element i·spacing.

    Copies that repeat at a fixed distance on both sides become one copy with one more loop. So the
    shards of a matrix that is split by columns are one copy, and by rows often a single run.
    """
    by_loops: dict[tuple[int, tuple[Loop, ...]], list[Copy]] = {}
    for i, layout in enumerate(shards):
        for copy in shard_copies(layout).copies:
            moved = replace(copy, dst=copy.dst + i * spacing)
            by_loops.setdefault((copy.source, copy.loops), []).append(moved)
    return tuple(copy for copies in by_loops.values() for copy in _merge_repeats(copies))


@lru_cache(maxsize=65536)  # as `shard_copies`; called for every host that holds the shard
def source_elements(layout: Layout) -> int:
    """The number of elements that a shard takes from all records together."""
    return sum(elements_by_source(layout).values())


def clip(copy: Copy, start: int, stop: int) -> Iterator[Copy]:
    """The parts of a copy whose source elements lie in [start, stop)."""
    if stop <= copy.src or copy.stop <= start:
        return
    if start <= copy.src and copy.stop <= stop:
        yield copy
        return
    loop, inner = copy.loops[0], copy.loops[1:]
    low, high = start - copy.src, stop - copy.src
    extent = _extent(inner)
    # Iteration i reads [i·stride, i·stride + extent). Iterations first…last overlap the range;
    # inside…outside are entirely within it.
    first = max(0, (low - extent) // loop.src + 1)
    last = min(loop.count, -(-high // loop.src))
    inside = max(first, -(-low // loop.src))
    outside = max(inside, min(last, (high - extent) // loop.src + 1))
    for i in (*range(first, min(inside, last)), *range(outside, last)):
        iteration = Copy(copy.source, copy.src + i * loop.src, copy.dst + i * loop.dst, inner)
        yield from clip(iteration, start, stop)
    if inside < outside:
        loops = (replace(loop, count=outside - inside), *inner)
        yield Copy(copy.source, copy.src + inside * loop.src, copy.dst + inside * loop.dst, loops)


def runs(copies: tuple[Copy, ...]) -> np.ndarray:
    """The source ranges that copies read, merged: int64 [runs, 2] of (start, stop)."""
    found = [_copy_runs(copy) for copy in copies]
    if not found:
        return np.empty((0, 2), np.int64)
    ranges = np.concatenate(found)
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    reach = np.maximum.accumulate(ranges[:, 1])
    breaks = np.flatnonzero(ranges[1:, 0] > reach[:-1])
    starts = ranges[np.concatenate([[0], breaks + 1]), 0]
    stops = reach[np.concatenate([breaks, [len(ranges) - 1]])]
    return np.stack([starts, stops], axis=1)


def _copy_runs(copy: Copy) -> np.ndarray:
    """The contiguous source ranges of one copy, not merged."""
    moving = [loop for loop in copy.loops if loop.src]
    length = 1
    while moving and moving[-1].src <= length:  # the innermost loops, which leave no gap
        loop = moving.pop()
        length += (loop.count - 1) * loop.src
    starts = np.array([copy.src], np.int64)
    for loop in moving:
        starts = (starts[:, None] + np.arange(loop.count) * loop.src).reshape(-1)
    return np.stack([starts, starts + length], axis=1)


def _extent(loops: tuple[Loop, ...]) -> int:
    """The distance from the first to one past the last source element of nested loops."""
    return 1 + sum((loop.count - 1) * loop.src for loop in loops)


def _merge_repeats(copies: list[Copy]) -> Iterator[Copy]:
    """Merges copies with equal loops wherever they follow each other at a constant distance."""
    copies = sorted(copies, key=lambda copy: (copy.src, copy.dst))
    steps = [(b.src - a.src, b.dst - a.dst) for a, b in pairwise(copies)]
    first = 0
    while first < len(copies):
        last = first
        while last < len(steps) and steps[last] == steps[first]:
            last += 1
        outer = [Loop(last - first + 1, *steps[first])] if last > first else []
        yield replace(copies[first], loops=_merge_loops([*outer, *copies[first].loops]))
        first = last + 1


def _merge_loops(loops: list[Loop]) -> tuple[Loop, ...]:
    """Sorts loops by descending source stride, drops single iterations, merges adjacent loops."""
    ordered = sorted((o for o in loops if o.count > 1), key=lambda o: (-o.src, -o.dst))
    merged: list[Loop] = []
    for inner in ordered:
        outer = merged[-1] if merged else None
        if outer and (outer.src, outer.dst) == (inner.count * inner.src, inner.count * inner.dst):
            merged[-1] = Loop(outer.count * inner.count, inner.src, inner.dst)
        else:
            merged.append(inner)
    return tuple(merged)
