"""A parameter dealt out to devices for reading, so that hosts which need the same read it once.

What the devices read is an array of its own, cut otherwise than the parameter; `exchange` makes
the parameter of it. A mesh is seen as dp × g × r here: dp replicas of the model, g distinct shards
of the parameter, r neighbors that hold the same one (all of `mp` where nothing is split, a few
where there are fewer key-value heads than shards). A seat is a device's position, counted row by
row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from mtj_loader.weights.view import ZEROS, Layout, Piece

_MAX_UNEVENNESS = 1.25  # a block of a quarter more than its share costs less than scattered reads


@dataclass(frozen=True)
class ReadAssignment:
    """A parameter in equal blocks, each read by one device.

    The blocks tile an array [g, *axes of a shard] of all distinct shards, whose `axis` is padded
    with zeros until `parts` divide it.

    Attributes:
      shards: the g distinct layouts.
      replicas: dp.
      repeats: r.
      axis: the axis of a shard that is cut.
      is_mixed: every block has its part of all g shards, so that it is a range of whole rows in the
        file; otherwise of one shard, and only the devices that hold that shard share it.
    """

    shards: tuple[Layout, ...]
    replicas: int
    repeats: int
    axis: int
    is_mixed: bool

    @cached_property
    def _hash(self) -> int:
        return hash((self.shards, self.replicas, self.repeats, self.axis, self.is_mixed))

    def __hash__(self) -> int:
        return self._hash

    @property
    def parts(self) -> int:
        """How many blocks share `axis`."""
        return self.replicas * self.repeats * (len(self.shards) if self.is_mixed else 1)

    @property
    def length(self) -> int:
        """Size of `axis`, without the padding."""
        return self.shards[0].shape[self.axis]

    @property
    def part(self) -> int:
        """Size of a block along `axis`."""
        return -(-self.length // self.parts)

    @property
    def array_shape(self) -> tuple[int, ...]:
        """The array that the blocks tile: [g, *axes], padded."""
        return (len(self.shards), *self._sized(self.part * self.parts))

    @property
    def block_shape(self) -> tuple[int, ...]:
        """One block: [g or 1, *axes]."""
        return (len(self.shards) if self.is_mixed else 1, *self._sized(self.part))

    def number_at(self, device_index: int) -> int:
        """Which block the device at a seat reads; `exchange` deals them out in the same order."""
        replica, j = divmod(device_index, len(self.shards) * self.repeats)
        shard, repeat = divmod(j, self.repeats)
        sharer = replica * self.repeats + repeat
        return sharer * len(self.shards) + shard if self.is_mixed else shard * self.parts + sharer

    def number_of(self, index: tuple[slice, ...]) -> int:
        """Which block has these slices of the array."""
        shard, first = (index[axis].start or 0 for axis in (0, 1 + self.axis))
        return shard * self.parts + first // self.part

    def block(self, number: int) -> Layout:
        """The layout of a block."""
        return _block(self, number)

    def read_elements(self, device_indices: Sequence[int]) -> int:
        """What devices at these seats read together, each block once."""
        return int(self._elements[self._mask(device_indices)].sum())

    def received_elements(self, device_indices: Sequence[int]) -> int:
        """What devices at these seats hold in the end without having read it."""
        n = len(self.shards) * self.repeats
        held = sorted({device_index % n // self.repeats for device_index in device_indices})
        return int(self._elements[held][~self._mask(device_indices)[held]].sum())

    def _sized(self, size: int) -> tuple[int, ...]:
        """A shard's shape with another size of `axis`."""
        shape = self.shards[0].shape
        return (*shape[: self.axis], size, *shape[self.axis + 1 :])

    def _mask(self, device_indices: Sequence[int]) -> np.ndarray:
        """Which parts of which shards are read at these seats, bool [g, parts]."""
        mask = np.zeros(self._elements.shape, bool)
        for shard, part in (
            divmod(self.number_at(device_index), self.parts) for device_index in device_indices
        ):
            mask[slice(None) if self.is_mixed else shard, part] = True
        return mask

    @cached_property
    def _elements(self) -> np.ndarray:
        """What each part of each shard takes from the files, int64 [g, parts].

        Counted without making the blocks: a plan for a pod needs all of them.
        """
        edges = np.arange(self.parts + 1) * self.part
        return np.stack([_between(layout, self.axis, edges) for layout in self.shards])


def slowest_axis(layout: Layout, parts: int) -> int | None:
    """Where to cut a shard so that its parts are equal, and as contiguous in the file as may be.

    Of the axes that `parts` divide about evenly it is the one along which neighbors lie farthest
    apart; where there is none, the axis that they divide most evenly. None if there is no axis to
    cut at all.
    """
    reach = [_reach(layout, axis) for axis in range(len(layout.shape))]
    axes = [axis for axis, distance in enumerate(reach) if distance is not None]
    uneven = {a: -(-layout.shape[a] // parts) * parts / layout.shape[a] for a in axes}
    even = [axis for axis in axes if uneven[axis] <= _MAX_UNEVENNESS]
    if even:
        return max(even, key=lambda axis: reach[axis] or 0)
    return min(axes, key=lambda axis: uneven[axis], default=None)


def _reach(layout: Layout, axis: int) -> int | None:
    """Elements between neighbors in the file; None where they may be the same element."""
    pieces = [p for p in layout.pieces if p.source != ZEROS and p.shape[axis] > 1]
    if any(piece.strides[axis] == 0 for piece in pieces):
        return None
    return max((piece.strides[axis] for piece in pieces), default=0)


@lru_cache(maxsize=65536)  # kinds of parameters × devices, as for shards
def _block(reading: ReadAssignment, number: int) -> Layout:
    shard, part = divmod(number, reading.parts)
    mine = reading.shards if reading.is_mixed else reading.shards[shard : shard + 1]
    return _stacked([_part(layout, reading, part) for layout in mine])


def _part(layout: Layout, reading: ReadAssignment, part: int) -> Layout:
    padded = layout.pad(reading.axis, reading.part * reading.parts)
    start, stop = [0] * len(padded.shape), list(padded.shape)
    start[reading.axis], stop[reading.axis] = part * reading.part, (part + 1) * reading.part
    return padded.slice(start, stop)


def _stacked(layouts: Sequence[Layout]) -> Layout:
    """Layouts of the same records along a new first axis."""
    pieces: list[Piece] = []
    for i, layout in enumerate(layouts):
        there = (i, *(0 for _ in layout.shape))
        pieces += [piece.shifted(there) for piece in layout.broadcast(0, 1).pieces]
    return Layout((len(layouts), *layouts[0].shape), tuple(pieces))


def _between(layout: Layout, axis: int, edges: np.ndarray) -> np.ndarray:
    """Elements that a layout takes from files between neighboring edges along an axis."""
    pieces = [piece for piece in layout.pieces if piece.source != ZEROS]
    starts = np.array([piece.start[axis] for piece in pieces], np.int64)[:, None]
    lengths = np.array([piece.shape[axis] for piece in pieces], np.int64)[:, None]
    each = np.array([_beside(piece, axis) for piece in pieces], np.int64)
    return each @ np.diff(np.clip(edges, starts, starts + lengths))


def _beside(piece: Piece, axis: int) -> int:
    """Elements that a piece takes from its file for each step along an axis, repeats once."""
    sizes = zip(piece.shape, piece.strides, strict=True)
    return math.prod(n for i, (n, stride) in enumerate(sizes) if stride and i != axis)
