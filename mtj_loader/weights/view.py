"""Views: lazy arrays over tensors in files, as lists of strided pieces.

A view has a shape and pieces. A piece maps a box of the view to a strided block of a record (as
`numpy.lib.stride_tricks.as_strided` does, but over a file), or to zeros. The pieces cover every
element of the view exactly once. A transform turns one list of pieces into another and reads
nothing, so a shard can be cut out before anything is merged, transposed or padded.

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

ZEROS = -1  # the `source` of a piece of padding


@dataclass(frozen=True, slots=True)
class Piece:
    """One box of a view and the strided block that fills it.

    Attributes:
      start: the box's first corner in the view.
      shape: the box's size along every axis.
      source: the index of one of the view's records, or ZEROS.
      offset: the element of the record at `start`.
      strides: the record's strides, in elements, per axis of the view; 0 repeats an element.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    source: int
    offset: int
    strides: tuple[int, ...]

    @property
    def stop(self) -> tuple[int, ...]:
        """The corner past the box's last element."""
        return tuple(map(add, self.start, self.shape))

    def cut(self, start: Sequence[int], stop: Sequence[int]) -> Piece | None:
        """The part inside a box of the view, still in the view's coordinates; None if empty."""
        low = tuple(map(max, self.start, start))
        shape = tuple(map(sub, map(min, self.stop, stop), low))
        if min(shape, default=1) <= 0:
            return None
        offset = self.offset + sum(map(mul, map(sub, low, self.start), self.strides))
        return Piece(low, shape, self.source, offset, self.strides)

    def shift(self, start: Sequence[int], sources: int = 0) -> Piece:
        """The same block moved by `start`, its source index increased by `sources`."""
        source = ZEROS if self.source == ZEROS else self.source + sources
        moved = tuple(map(add, self.start, start))
        return Piece(moved, self.shape, source, self.offset, self.strides)


@dataclass(frozen=True)
class Layout:
    """A view's shape and pieces, without its records.

    Layers of one model share layouts, so whatever depends on a layout alone (its shards, their
    byte counts) is computed once and not once per layer.
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
        """Like `numpy.transpose`: axis i of the result is axis `axes[i]` of this layout."""

        def pick(values: Sequence[int]) -> tuple[int, ...]:
            return tuple(values[a] for a in axes)

        pieces = tuple(
            replace(p, start=pick(p.start), shape=pick(p.shape), strides=pick(p.strides))
            for p in self.pieces
        )
        return Layout(pick(self.shape), pieces)

    def slice(self, start: Sequence[int], stop: Sequence[int]) -> Layout:
        """The box from corner `start` up to, but without, corner `stop`."""
        back = tuple(-a for a in start)
        cuts = (piece.cut(start, stop) for piece in self.pieces)
        shape = tuple(b - a for a, b in zip(start, stop, strict=True))
        return Layout(shape, tuple(cut.shift(back) for cut in cuts if cut is not None))

    def pad(self, axis: int, size: int) -> Layout:
        """Appends zeros along `axis`, up to a length of `size`."""
        old = self.shape[axis]
        if size == old:
            return self
        start = tuple(old if i == axis else 0 for i in range(len(self.shape)))
        shape = _with(self.shape, axis, size - old)
        zeros = Piece(start, shape, ZEROS, 0, (0,) * len(shape))
        return Layout(_with(self.shape, axis, size), (*self.pieces, zeros))

    def split_axis(self, axis: int, sizes: Sequence[int]) -> Layout:
        """Splits one axis into several, row-major, like a numpy reshape: [h·k] to [h, k]."""
        if math.prod(sizes) != self.shape[axis]:
            raise ValueError(f"cannot split an axis of {self.shape[axis]} into {tuple(sizes)}")
        if len(sizes) == 1:
            return self
        inner = math.prod(sizes[1:])
        pieces = tuple(part for p in self.pieces for part in _split_piece(p, axis, inner))
        shape = (*self.shape[:axis], sizes[0], inner, *self.shape[axis + 1 :])
        return Layout(shape, pieces).split_axis(axis + 1, sizes[1:])

    def broadcast(self, axis: int, size: int) -> Layout:
        """Inserts an axis along which everything repeats `size` times."""

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
            overlaps = (starts[:i] < stops[i]) & (starts[i] < stops[:i])
            if overlaps.all(axis=1).any():
                raise ValueError(f"piece {i} overlaps an earlier piece")


@dataclass(frozen=True)
class View:
    """A lazy array: a layout, and the records that its pieces refer to."""

    layout: Layout
    records: tuple[TensorRecord, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The view's shape."""
        return self.layout.shape

    def with_layout(self, layout: Layout) -> View:
        """A view of the same records with another layout."""
        return View(layout, self.records)

    def transpose(self, axes: Sequence[int]) -> View:
        """See `Layout.transpose`."""
        return self.with_layout(_cached(Layout.transpose, self.layout, tuple(axes)))

    def slice(self, start: Sequence[int], stop: Sequence[int]) -> View:
        """See `Layout.slice`."""
        return self.with_layout(_cached(Layout.slice, self.layout, tuple(start), tuple(stop)))

    def pad(self, axis: int, size: int) -> View:
        """See `Layout.pad`."""
        return self.with_layout(_cached(Layout.pad, self.layout, axis, size))

    def split_axis(self, axis: int, sizes: Sequence[int]) -> View:
        """See `Layout.split_axis`."""
        return self.with_layout(_cached(Layout.split_axis, self.layout, axis, tuple(sizes)))

    def broadcast(self, axis: int, size: int) -> View:
        """See `Layout.broadcast`."""
        return self.with_layout(_cached(Layout.broadcast, self.layout, axis, size))


@lru_cache(maxsize=4096)  # kinds of tensors × operations on each; a model has a few dozen of each
def _cached(operation: Callable[..., Layout], *arguments: Any) -> Layout:  # noqa: ANN401 -- passed on
    """The result of an operation, computed once and shared by equal layers."""
    return operation(*arguments)


def view_of(record: TensorRecord) -> View:
    """A view of one whole tensor, as it is in the file."""
    return View(_cached(_whole_layout, record.shape, record.strides), (record,))


def _whole_layout(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> Layout:
    """The layout of a whole tensor; without strides it is row-major."""
    strides = row_major(shape) if strides is None else strides
    piece = Piece((0,) * len(shape), shape, 0, 0, strides)
    return Layout(shape, (piece,) if math.prod(shape) else ())


def zeros(shape: tuple[int, ...]) -> View:
    """A view that is all zeros."""
    piece = Piece((0,) * len(shape), shape, ZEROS, 0, (0,) * len(shape))
    return View(Layout(shape, (piece,)), ())


def concat(views: Sequence[View], axis: int) -> View:
    """Like `numpy.concatenate`.

    Raises:
      ValueError: the shapes differ along another axis.
    """
    layouts = tuple(view.layout for view in views)
    counts = tuple(len(view.records) for view in views)
    records = tuple(record for view in views for record in view.records)
    return View(_cached(_concat, layouts, counts, axis), records)


def _concat(layouts: Sequence[Layout], counts: Sequence[int], axis: int) -> Layout:
    """Joins layouts along an axis; `counts` is the number of records of each."""
    first = layouts[0].shape
    pieces: list[Piece] = []
    sources = length = 0
    for layout, count in zip(layouts, counts, strict=True):
        if _with(layout.shape, axis, 0) != _with(first, axis, 0):
            raise ValueError(f"cannot join {layout.shape} to {first} along axis {axis}")
        start = _with((0,) * len(first), axis, length)
        pieces += [piece.shift(start, sources) for piece in layout.pieces]
        sources += count
        length += layout.shape[axis]
    joined = Layout(_with(first, axis, length), tuple(pieces))
    joined.check_tiling()
    return joined


def stack(views: Sequence[View], axis: int) -> View:
    """Like `numpy.stack`."""
    return concat([view.broadcast(axis, 1) for view in views], axis)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous array of this shape."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _split_piece(piece: Piece, axis: int, inner: int) -> Iterator[Piece]:
    """The boxes of a piece once `axis` is split into [outer, inner]; up to three."""
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
