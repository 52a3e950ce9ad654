"""Views: lazy arrays over tensors in files, as lists of strided pieces.

A view has a shape and pieces. A piece says: this box of the view is that strided block of that
record (as `numpy.lib.stride_tricks.as_strided`, but over a file), or zeros. The pieces of a view
tile it exactly once. Each transform turns one list of pieces into another; no byte is read. So a
shard can be cut before anything is merged, transposed or padded.

Offsets and strides count elements of the record, not bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from operator import add, mul, sub
from typing import Any

import numpy as np

from mtj_loader.formats.records import TensorRecord

ZEROS = -1  # the `source` of a piece that is padding


@dataclass(frozen=True, slots=True)
class Piece:
    """One box of a view and the strided block that fills it.

    Attributes:
      start: the box's first corner in the view.
      shape: the box's size along every axis.
      source: which of the view's records, or ZEROS.
      offset: the element of the record that lies at `start`.
      strides: elements of the record between neighbors, per axis of the view; 0 repeats.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    source: int
    offset: int
    strides: tuple[int, ...]

    @property
    def stop(self) -> tuple[int, ...]:
        """The corner behind the box's last element."""
        return tuple(map(add, self.start, self.shape))

    def cut(self, start: Sequence[int], stop: Sequence[int]) -> Piece | None:
        """The part inside a box of the view, still in the view's coordinates; None if empty."""
        low = tuple(map(max, self.start, start))
        shape = tuple(map(sub, map(min, self.stop, stop), low))
        if min(shape, default=1) <= 0:
            return None
        offset = self.offset + sum(map(mul, map(sub, low, self.start), self.strides))
        return Piece(low, shape, self.source, offset, self.strides)

    def shifted(self, start: Sequence[int], sources: int = 0) -> Piece:
        """The same block at start + `start`, its source renumbered when views are joined."""
        source = ZEROS if self.source == ZEROS else self.source + sources
        moved = tuple(map(add, self.start, start))
        return Piece(moved, self.shape, source, self.offset, self.strides)


@dataclass(frozen=True)
class Layout:
    """A view's shape and pieces, without its records: equal layouts read alike.

    Layers of one model share layouts, so whatever follows from a layout alone (its shards, their
    byte counts) is worked out once and not once a layer.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @cached_property
    def _hash(self) -> int:
        return hash((self.shape, self.pieces))

    def __hash__(self) -> int:
        return self._hash

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def transpose(self, axes: Sequence[int]) -> Layout:
        """As `numpy.transpose`: axis i of the result is axis `axes[i]` of this."""

        def pick(values: Sequence[int]) -> tuple[int, ...]:
            return tuple(values[a] for a in axes)

        pieces = tuple(
            replace(p, start=pick(p.start), shape=pick(p.shape), strides=pick(p.strides))
            for p in self.pieces
        )
        return Layout(pick(self.shape), pieces)

    def slice(self, start: Sequence[int], stop: Sequence[int]) -> Layout:
        """The box from corner `start` up to, and without, corner `stop`."""
        back = tuple(-a for a in start)
        cuts = (piece.cut(start, stop) for piece in self.pieces)
        shape = tuple(b - a for a, b in zip(start, stop, strict=True))
        return Layout(shape, tuple(cut.shifted(back) for cut in cuts if cut is not None))

    def pad(self, axis: int, size: int) -> Layout:
        """Zeros behind the last element of `axis`, up to `size` along it."""
        old = self.shape[axis]
        if size == old:
            return self
        start = tuple(old if i == axis else 0 for i in range(len(self.shape)))
        shape = _with(self.shape, axis, size - old)
        zeros = Piece(start, shape, ZEROS, 0, (0,) * len(shape))
        return Layout(_with(self.shape, axis, size), (*self.pieces, zeros))

    def split_axis(self, axis: int, sizes: Sequence[int]) -> Layout:
        """One axis becomes several, row-major, as a numpy reshape: [h·k] to [h, k]."""
        if math.prod(sizes) != self.shape[axis]:
            raise ValueError(f"cannot split an axis of {self.shape[axis]} into {tuple(sizes)}")
        if len(sizes) == 1:
            return self
        inner = math.prod(sizes[1:])
        pieces = tuple(part for p in self.pieces for part in _split_piece(p, axis, inner))
        shape = (*self.shape[:axis], sizes[0], inner, *self.shape[axis + 1 :])
        return Layout(shape, pieces).split_axis(axis + 1, sizes[1:])

    def broadcast(self, axis: int, size: int) -> Layout:
        """A new axis along which everything repeats `size` times."""

        def insert(values: tuple[int, ...], value: int) -> tuple[int, ...]:
            return (*values[:axis], value, *values[axis:])

        pieces = tuple(
            replace(
                p,
                start=insert(p.start, 0),
                shape=insert(p.shape, size),
                strides=insert(p.strides, 0),
            )
            for p in self.pieces
        )
        return Layout(insert(self.shape, size), pieces)

    def check_tiling(self) -> None:
        """Raises ValueError unless the pieces cover every element exactly once."""
        covered = sum(math.prod(p.shape) for p in self.pieces)
        if covered != self.size:
            raise ValueError(f"pieces cover {covered} elements of a view of {self.size}")
        if len(self.pieces) < 2:
            return
        starts = np.array([p.start for p in self.pieces])
        stops = np.array([p.stop for p in self.pieces])
        for i in range(1, len(starts)):
            barrier = (starts[:i] < stops[i]) & (starts[i] < stops[:i])
            if barrier.all(axis=1).any():
                raise ValueError(f"piece {i} covers elements that an earlier piece covers")


@dataclass(frozen=True)
class View:
    """A lazy array: a layout, and the records that its pieces take their elements from."""

    layout: Layout
    records: tuple[TensorRecord, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The view's shape."""
        return self.layout.shape

    def with_layout(self, layout: Layout) -> View:
        """The same records behind another layout."""
        return View(layout, self.records)

    def transpose(self, axes: Sequence[int]) -> View:
        """See `Layout.transpose`."""
        return self.with_layout(_once(Layout.transpose, self.layout, tuple(axes)))

    def slice(self, start: Sequence[int], stop: Sequence[int]) -> View:
        """See `Layout.slice`."""
        return self.with_layout(_once(Layout.slice, self.layout, tuple(start), tuple(stop)))

    def pad(self, axis: int, size: int) -> View:
        """See `Layout.pad`."""
        return self.with_layout(_once(Layout.pad, self.layout, axis, size))

    def split_axis(self, axis: int, sizes: Sequence[int]) -> View:
        """See `Layout.split_axis`."""
        return self.with_layout(_once(Layout.split_axis, self.layout, axis, tuple(sizes)))

    def broadcast(self, axis: int, size: int) -> View:
        """See `Layout.broadcast`."""
        return self.with_layout(_once(Layout.broadcast, self.layout, axis, size))


@lru_cache(maxsize=4096)  # kinds of tensors × operations on each; a model has a few dozen of both
def _once(operation: Callable[..., Layout], *arguments: Any) -> Layout:  # noqa: ANN401 -- passed on
    """What an operation gives, worked out once and shared by all layers that are alike."""
    return operation(*arguments)


def view_of(record: TensorRecord) -> View:
    """The view that is one tensor as the file has it."""
    return View(_once(_whole, record.shape, record.strides), (record,))


def _whole(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> Layout:
    """A tensor as one piece; without strides it is row-major."""
    strides = row_major(shape) if strides is None else strides
    piece = Piece((0,) * len(shape), shape, 0, 0, strides)
    return Layout(shape, (piece,) if math.prod(shape) else ())


def zeros(shape: tuple[int, ...]) -> View:
    """A view of nothing but zeros."""
    piece = Piece((0,) * len(shape), shape, ZEROS, 0, (0,) * len(shape))
    return View(Layout(shape, (piece,)), ())


def concat(views: Sequence[View], axis: int) -> View:
    """As `numpy.concatenate`.

    Raises:
      ValueError: the shapes differ along another axis.
    """
    layouts = tuple(view.layout for view in views)
    counts = tuple(len(view.records) for view in views)
    records = tuple(record for view in views for record in view.records)
    return View(_once(_concat, layouts, counts, axis), records)


def _concat(layouts: Sequence[Layout], counts: Sequence[int], axis: int) -> Layout:
    """Layouts of `counts` records each, one behind the other along an axis."""
    first = layouts[0].shape
    pieces: list[Piece] = []
    sources = length = 0
    for layout, count in zip(layouts, counts, strict=True):
        if _with(layout.shape, axis, 0) != _with(first, axis, 0):
            raise ValueError(f"cannot join {layout.shape} to {first} along axis {axis}")
        start = _with((0,) * len(first), axis, length)
        pieces += [piece.shifted(start, sources) for piece in layout.pieces]
        sources += count
        length += layout.shape[axis]
    joined = Layout(_with(first, axis, length), tuple(pieces))
    joined.check_tiling()
    return joined


def stack(views: Sequence[View], axis: int) -> View:
    """As `numpy.stack`."""
    return concat([view.broadcast(axis, 1) for view in views], axis)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous array of this shape."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _split_piece(piece: Piece, axis: int, inner: int) -> Iterator[Piece]:
    """The piece's boxes once `axis` is [outer, inner]: up to three if its ends are inside rows."""
    stride = piece.strides[axis]
    first = piece.start[axis]
    for (row, col), (rows, cols) in _row_boxes(first, first + piece.shape[axis], inner):
        yield Piece(
            (*piece.start[:axis], row, col, *piece.start[axis + 1 :]),
            (*piece.shape[:axis], rows, cols, *piece.shape[axis + 1 :]),
            piece.source,
            piece.offset + (row * inner + col - first) * stride,
            (*piece.strides[:axis], stride * inner, stride, *piece.strides[axis + 1 :]),
        )


def _row_boxes(
    start: int, stop: int, width: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """The boxes (first corner, size) that a flat range fills in rows of `width`."""
    (row, col), (last, rest) = divmod(start, width), divmod(stop, width)
    if col and row == last:
        yield (row, col), (1, rest - col)
        return
    if col:
        yield (row, col), (1, width - col)
        row += 1
    if row < last:
        yield (row, 0), (last - row, width)
    if rest:
        yield (last, 0), (1, rest)


def _with(values: Sequence[int], axis: int, value: int) -> tuple[int, ...]:
    return (*values[:axis], value, *values[axis + 1 :])
