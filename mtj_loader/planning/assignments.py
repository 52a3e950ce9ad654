"""The two read assignments, which say what part of a parameter each device reads.

This part is called a block, whether it is a shard or not. Blocks have numbers; several devices may
read the same one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mtj_loader.weights.copies import source_elements
from mtj_loader.weights.view import ZEROS, Layout, Piece

_MAX_UNEVENNESS = 1.25  # a block 25% above its even share costs less than scattered reads


@dataclass(frozen=True)
class OwnShards:
    """Every device reads its own shard.

    Attributes:
      shards: the layout of each shard.
      shape: one shard on its device, [*groups]; axes in one group are merged.
    """

    shards: tuple[Layout, ...]
    shape: tuple[int, ...]

    is_shared: ClassVar[bool] = False  # no host reads for another

    @property
    def description(self) -> str:
        """The assignment in the words of docs/json.md."""
        return "own shards"

    @property
    def array_shape(self) -> tuple[int, ...]:
        """The array that the devices read together: [n, *groups]."""
        return (len(self.shards), *self.shape)

    @property
    def block_shape(self) -> tuple[int, ...]:
        """One device's block of that array: [1, *groups]."""
        return (1, *self.shape)

    @property
    def layout_shape(self) -> tuple[int, ...]:
        """The same block with its axes unmerged."""
        return self.shards[0].shape

    def sharding(self, mesh: Mesh) -> NamedSharding:
        """The sharding of the array on a mesh with the axes dp and mp."""
        return NamedSharding(mesh, PartitionSpec("mp"))

    def block_of_device(self, device_index: int) -> int:
        """The number of the block that a device reads; see `Topology.device_indices_of`."""
        return device_index % len(self.shards)

    def block_at(self, index: tuple[slice, ...]) -> int:
        """The number of the block at these slices of the array."""
        return index[0].start or 0

    def layout(self, block: int) -> Layout:
        """The layout of a block."""
        return self.shards[block]

    def read_elements(self, device_indices: Sequence[int]) -> int:
        """Elements that these devices read together, each distinct layout once."""
        return sum(source_elements(layout) for layout in distinct(self, device_indices))

    def received_elements(self, device_indices: Sequence[int]) -> int:
        """Elements that these devices receive from others: none."""
        del device_indices
        return 0

    def final_buffers(self, device_indices: Sequence[int]) -> int:
        """The number of host buffers that back the final arrays of these devices on a CPU backend.

        Devices with equal shards adopt the same buffer.
        """
        return len(distinct(self, device_indices))


@dataclass(frozen=True)
class SharedBlocks:
    """Every device reads one of the equal blocks of a parameter; then the devices exchange them.

    The mesh is viewed as dp × g × r: dp replicas of the model, g distinct shards of the parameter,
    and r neighbors that hold the same one (all of `mp` for a parameter that is not split; a few
    where there are fewer key-value heads than shards). The blocks tile an array [g, *axes of a
    shard] of the distinct shards, whose `axis` is padded with zeros to a multiple of `parts`.
    `reshard` makes the parameter from this array.

    Attributes:
      shards: the g distinct layouts.
      replicas: dp.
      repeats: r.
      axis: the axis of a shard that is divided.
      is_mixed: each block holds its part of all g shards, which makes it a range of whole rows in
        the file. Otherwise a block belongs to one shard, and only the devices that hold this shard
        share it.
    """

    shards: tuple[Layout, ...]
    replicas: int
    repeats: int
    axis: int
    is_mixed: bool

    is_shared: ClassVar[bool] = True

    @cached_property
    def _hash(self) -> int:
        return hash((self.shards, self.replicas, self.repeats, self.axis, self.is_mixed))

    def __hash__(self) -> int:
        return self._hash

    @property
    def description(self) -> str:
        """The assignment in the words of docs/json.md."""
        return "blocks of all shards" if self.is_mixed else "blocks of each shard"

    @property
    def parts(self) -> int:
        """How many blocks `axis` is divided into."""
        return self.replicas * self.repeats * (len(self.shards) if self.is_mixed else 1)

    @property
    def length(self) -> int:
        """Size of `axis` without the padding."""
        return self.shards[0].shape[self.axis]

    @property
    def part(self) -> int:
        """Size of a block along `axis`."""
        return -(-self.length // self.parts)

    @property
    def array_shape(self) -> tuple[int, ...]:
        """The array that the blocks tile: [g, *axes], padded."""
        return (len(self.shards), *self._resized(self.part * self.parts))

    @property
    def block_shape(self) -> tuple[int, ...]:
        """One block: [g or 1, *axes]."""
        return (len(self.shards) if self.is_mixed else 1, *self._resized(self.part))

    @property
    def layout_shape(self) -> tuple[int, ...]:
        """The same as `block_shape`, because no axes of a block are merged."""
        return self.block_shape

    def sharding(self, mesh: Mesh) -> NamedSharding:
        """The sharding of the array on a mesh with the axes dp and mp, viewed as dp × g × r."""
        names = ("dp", "g", "r")
        shape = (self.replicas, len(self.shards), self.repeats)
        viewed = Mesh(mesh.devices.reshape(shape), names, axis_types=(AxisType.Auto,) * 3)
        whole = (None,) * self.axis
        if self.is_mixed:
            return NamedSharding(viewed, PartitionSpec(None, *whole, ("dp", "r", "g")))
        return NamedSharding(viewed, PartitionSpec("g", *whole, ("dp", "r")))

    def block_of_device(self, device_index: int) -> int:
        """The number of the block that a device reads, in the order of `sharding`."""
        replica, j = divmod(device_index, len(self.shards) * self.repeats)
        shard, repeat = divmod(j, self.repeats)
        holder = replica * self.repeats + repeat  # among the devices that hold this shard
        if self.is_mixed:
            return holder * len(self.shards) + shard
        return shard * self.parts + holder

    def block_at(self, index: tuple[slice, ...]) -> int:
        """The number of the block at these slices of the array."""
        shard, first = (index[axis].start or 0 for axis in (0, 1 + self.axis))
        return shard * self.parts + first // self.part

    def layout(self, block: int) -> Layout:
        """The layout of a block."""
        return _block_layout(self, block)

    def read_elements(self, device_indices: Sequence[int]) -> int:
        """Elements that these devices read together, each block once."""
        return int(self._elements[self._mask(device_indices)].sum())

    def received_elements(self, device_indices: Sequence[int]) -> int:
        """Elements that these devices hold in the end but have not read."""
        n = len(self.shards) * self.repeats
        held = sorted({device_index % n // self.repeats for device_index in device_indices})
        return int(self._elements[held][~self._mask(device_indices)[held]].sum())

    def final_buffers(self, device_indices: Sequence[int]) -> int:
        """The number of host buffers that back the final arrays: one for each device."""
        return len(device_indices)

    def _resized(self, size: int) -> tuple[int, ...]:
        """A shard's shape with another size of `axis`."""
        shape = self.shards[0].shape
        return (*shape[: self.axis], size, *shape[self.axis + 1 :])

    def _mask(self, device_indices: Sequence[int]) -> np.ndarray:
        """Which parts of which shards these devices read, bool [g, parts]."""
        mask = np.zeros(self._elements.shape, bool)
        for device_index in device_indices:
            shard, part = divmod(self.block_of_device(device_index), self.parts)
            mask[slice(None) if self.is_mixed else shard, part] = True
        return mask

    @cached_property
    def _elements(self) -> np.ndarray:
        """Elements that each part of each shard takes from the files, int64 [g, parts].

        They are counted without building the blocks, because a plan for a pod needs all of them.
        """
        edges = np.arange(self.parts + 1) * self.part
        return np.stack([_elements_between(layout, self.axis, edges) for layout in self.shards])


ReadAssignment = OwnShards | SharedBlocks


def distinct(
    assignment: ReadAssignment, device_indices: Sequence[int]
) -> Mapping[Layout, Sequence[int]]:
    """The different layouts that some devices read, each with the numbers of its blocks."""
    blocks = tuple(dict.fromkeys(map(assignment.block_of_device, device_indices)))
    return _group_equal(blocks, tuple(map(assignment.layout, blocks)))


@lru_cache(maxsize=1024)  # kinds of parameters × hosts that one process plans for
def _group_equal(
    blocks: tuple[int, ...], layouts: tuple[Layout, ...]
) -> Mapping[Layout, list[int]]:
    groups: dict[Layout, list[int]] = {}
    for block, layout in zip(blocks, layouts, strict=True):
        groups.setdefault(layout, []).append(block)
    return groups


# ---- blocks


def slowest_axis(layout: Layout, parts: int) -> int | None:
    """The axis to divide a shard along: into equal parts, as contiguous in the file as possible.

    Among the axes that divide into `parts` about evenly, this is the one whose neighbors lie
    farthest apart in the file. If no axis does, it is the one that divides most evenly. None if no
    axis can be divided at all.
    """
    distances = [_neighbor_distance(layout, axis) for axis in range(len(layout.shape))]
    axes = [axis for axis, distance in enumerate(distances) if distance is not None]
    uneven = {a: -(-layout.shape[a] // parts) * parts / layout.shape[a] for a in axes}
    even = [axis for axis in axes if uneven[axis] <= _MAX_UNEVENNESS]
    if even:
        return max(even, key=lambda axis: distances[axis] or 0)
    return min(axes, key=lambda axis: uneven[axis], default=None)


def _neighbor_distance(layout: Layout, axis: int) -> int | None:
    """Elements between neighbors in the file; None if they may be the same element."""
    pieces = [p for p in layout.pieces if p.source != ZEROS and p.shape[axis] > 1]
    if any(piece.strides[axis] == 0 for piece in pieces):
        return None
    return max((piece.strides[axis] for piece in pieces), default=0)


@lru_cache(maxsize=65536)  # kinds of parameters × devices, as for shards
def _block_layout(blocks: SharedBlocks, block: int) -> Layout:
    shard, part = divmod(block, blocks.parts)
    layouts = blocks.shards if blocks.is_mixed else blocks.shards[shard : shard + 1]
    return _stack([_slice_part(layout, blocks, part) for layout in layouts])


def _slice_part(layout: Layout, blocks: SharedBlocks, part: int) -> Layout:
    padded = layout.pad(blocks.axis, blocks.part * blocks.parts)
    start, stop = [0] * len(padded.shape), list(padded.shape)
    start[blocks.axis], stop[blocks.axis] = part * blocks.part, (part + 1) * blocks.part
    return padded.slice(start, stop)


def _stack(layouts: Sequence[Layout]) -> Layout:
    """Layouts of the same records along a new first axis."""
    pieces: list[Piece] = []
    for i, layout in enumerate(layouts):
        corner = (i, *(0 for _ in layout.shape))
        pieces += [piece.shift(corner) for piece in layout.broadcast(0, 1).pieces]
    return Layout((len(layouts), *layouts[0].shape), tuple(pieces))


def _elements_between(layout: Layout, axis: int, edges: np.ndarray) -> np.ndarray:
    """Elements that a layout takes from files between neighboring edges along an axis."""
    pieces = [piece for piece in layout.pieces if piece.source != ZEROS]
    starts = np.array([piece.start[axis] for piece in pieces], np.int64)[:, None]
    lengths = np.array([piece.shape[axis] for piece in pieces], np.int64)[:, None]
    per_step = np.array([_elements_per_step(piece, axis) for piece in pieces], np.int64)
    return per_step @ np.diff(np.clip(edges, starts, starts + lengths))


def _elements_per_step(piece: Piece, axis: int) -> int:
    """Elements that a piece takes from its file for each step along an axis, repeats once."""
    sizes = zip(piece.shape, piece.strides, strict=True)
    return math.prod(n for i, (n, stride) in enumerate(sizes) if stride and i != axis)
