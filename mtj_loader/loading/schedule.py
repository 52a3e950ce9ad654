"""What one host reads, and in which order.

A target is one parameter on this host, or one section of a block that is larger than the staging
memory. Reads fill its buffer: either directly, or in chunks through scratch memory. The reads of a
target depend only on layouts, so layers with equal layouts share them. Targets are collected into
batches; a batch has one piece of memory and is transferred to the devices at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from mtj_loader.loading.buffers import ALIGNMENT_BYTES, Buffers, align
from mtj_loader.planning.assignments import distinct
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.param_plan import ParamPlan
from mtj_loader.storage.base import ByteRange
from mtj_loader.weights import kernels
from mtj_loader.weights.copies import Copy, clip, join_shards, runs, shard_copies
from mtj_loader.weights.read_layouts import byte_ranges
from mtj_loader.weights.view import Layout

CHUNK_BYTES = 1 << 20  # one chunk stays in the L2 cache between its read and its copies
# A transpose writes as many adjacent elements of the target as a chunk has rows; with chunks of
# 1 MiB it took 25 % longer.
_TRANSPOSED_CHUNK_BYTES = 4 << 20
DIRECT_READ_BYTES = 8 << 20  # long direct reads are divided, so that threads can share them
_MIN_DIRECT_READ_BYTES = 64 << 10  # below, one chunk for all layouts takes fewer system calls
_WORK_BYTES = 4 << 20  # what a thread gets at a time: many small tensors or part of a large one


# ---- reads


@dataclass(frozen=True, slots=True)
class Read:
    """One unit of reading. Offsets and sizes count elements of the record `source`.

    Attributes:
      source: the index of one of the view's records.
      runs: the ranges (start, stop) to read, sorted; all fit in one chunk.
      copies: the copies into the target's buffer.
      is_direct: the only run is read directly to where the only copy puts it.
    """

    source: int
    runs: tuple[tuple[int, int], ...]
    copies: tuple[Copy, ...]
    is_direct: bool

    @property
    def start(self) -> int:
        """The first element read."""
        return self.runs[0][0]

    @property
    def span(self) -> int:
        """Elements from the first to the last one read, including gaps."""
        return self.runs[-1][1] - self.start

    @property
    def size(self) -> int:
        """Elements read."""
        return sum(stop - start for start, stop in self.runs)


@lru_cache(maxsize=1024)  # kinds of parameters × hosts that one process plans for
def schedule_reads(
    layouts: tuple[Layout, ...], spacing: int, itemsize: int, may_read_directly: bool
) -> tuple[Read, ...]:
    """The reads that fill distinct blocks of one parameter; no source element is read twice.

    Args:
      layouts: the distinct layouts that this host's devices read.
      spacing: elements from the start of one layout in the buffer to the start of the next.
      itemsize: bytes per element in the file.
      may_read_directly: elements do not change, so bytes may go from the file to the buffer.
    """
    copies = join_shards(layouts, spacing)
    reads: list[Read] = []
    for source in sorted({copy.source for copy in copies}):
        mine = [copy for copy in copies if copy.source == source]
        direct = [c for c in mine if may_read_directly and _is_direct(c, mine, itemsize)]
        for copy in direct:
            reads += _direct_reads(copy, DIRECT_READ_BYTES // itemsize)
        rest = [copy for copy in mine if copy not in direct]
        transposed = may_read_directly and any(copy.is_transpose for copy in rest)
        chunk_bytes = _TRANSPOSED_CHUNK_BYTES if transposed else CHUNK_BYTES
        reads += _chunk_reads(source, rest, chunk_bytes // itemsize)
    return tuple(reads)


def _is_direct(copy: Copy, all_copies: list[Copy], itemsize: int) -> bool:
    """Whether a copy is contiguous, shares no element with others, and is long or the only copy."""
    if not copy.is_contiguous:
        return False
    if len(all_copies) > 1 and copy.size * itemsize < _MIN_DIRECT_READ_BYTES:
        return False
    return sum(c.src < copy.stop and copy.src < c.stop for c in all_copies) == 1


def _direct_reads(copy: Copy, max_length: int) -> Iterator[Read]:
    for start in range(copy.src, copy.stop, max_length):
        stop = min(start + max_length, copy.stop)
        yield Read(copy.source, ((start, stop),), tuple(clip(copy, start, stop)), is_direct=True)


def _chunk_reads(source: int, copies: list[Copy], max_length: int) -> Iterator[Read]:
    needed = runs(tuple(copies))
    if not len(needed):
        return
    length = _chunk_length(copies, max_length)
    first, last = int(needed[0, 0]), int(needed[-1, 1])
    for start in range(first, last, length):
        stop = min(start + length, last)
        inside = _clip_runs(needed, start, stop)
        if inside:
            parts = tuple(part for copy in copies for part in clip(copy, start, stop))
            yield Read(source, inside, parts, is_direct=False)


def _chunk_length(copies: list[Copy], max_length: int) -> int:
    """As many whole rows as fit, so that few copies are divided within a row."""
    strides = [loop.src for copy in copies for loop in copy.loops if loop.src <= max_length]
    row = max(strides, default=1) or 1
    return max_length // row * row


def _clip_runs(needed: np.ndarray, start: int, stop: int) -> tuple[tuple[int, int], ...]:
    """The part of sorted, disjoint runs that lies in [start, stop)."""
    low = int(np.searchsorted(needed[:, 1], start, side="right"))
    high = int(np.searchsorted(needed[:, 0], stop, side="left"))
    inside = np.clip(needed[low:high], start, stop)
    return tuple((a, b) for a, b in inside.tolist())


# ---- targets


@dataclass(frozen=True, eq=False)
class Target:
    """One parameter on this host, or one section of one of its blocks.

    Its buffer is flat, in the parameter's dtype on the devices, and holds all of `layouts` at
    equal, aligned distances.

    Attributes:
      param: the plan of the parameter.
      layouts: the distinct layouts to read, each with the numbers of its blocks; see
        `assignments.distinct`.
      corner: of a section, its first element's position in the block; None for whole blocks.
      is_whole: it includes everything that this host's devices read of the parameter.
    """

    param: ParamPlan
    layouts: Mapping[Layout, Sequence[int]]
    corner: tuple[int, ...] | None = None
    is_whole: bool = False

    @cached_property
    def convert(self) -> kernels.Conversion | None:
        """The element-wise work between file and device; None if there is none."""
        return kernels.make_conversion(
            self.param.source_dtype, self.param.dtype, self.param.divisor
        )

    @property
    def reads(self) -> tuple[Read, ...]:
        """The reads that fill the buffer."""
        itemsize = self.param.source_dtype.itemsize
        return schedule_reads(tuple(self.layouts), self._spacing, itemsize, self.convert is None)

    @property
    def size_bytes(self) -> int:
        """Size of the buffer."""
        return self._spacing * len(self.layouts) * self.param.dtype.itemsize

    @cached_property
    def _spacing(self) -> int:
        """Elements from the start of one layout to the start of the next; all have equal sizes."""
        size = next(iter(self.layouts)).size
        return align(size * self.param.dtype.itemsize) // self.param.dtype.itemsize

    def make_buffer(self, memory: np.ndarray) -> np.ndarray:
        """Makes the buffer from the start of `memory` (uint8), and writes the zeros of padding."""
        buffer = memory[: self.size_bytes].view(self.param.dtype)
        for layout, part in zip(self.layouts, self.split(buffer), strict=True):
            for box in shard_copies(layout).zeros:
                part.reshape(layout.shape)[box] = 0
        return buffer

    def split(self, buffer: np.ndarray) -> list[np.ndarray]:
        """Each layout's part of the buffer, flat."""
        return [buffer[i * self._spacing :][: layout.size] for i, layout in enumerate(self.layouts)]


def list_targets(plan: LoadPlan, host: int, section_bytes: int | None) -> list[Target]:
    """Everything that a host reads, in file order.

    Args:
      plan: the plan.
      host: the process index.
      section_bytes: the largest target; larger ones are divided. None: no limit.
    """
    device_indices = plan.topology.device_indices_of(host)
    targets: list[Target] = []
    for param in plan.params:
        whole = Target(param, distinct(param.assignment, device_indices), is_whole=True)
        if section_bytes is None or whole.size_bytes <= section_bytes:
            targets.append(whole)
        else:
            targets += _divide(whole, section_bytes)
    return targets


def _divide(target: Target, section_bytes: int) -> Iterator[Target]:
    """One target per layout, or several for a layout that is itself too large."""
    itemsize = target.param.dtype.itemsize
    max_elements = section_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES // itemsize
    for layout, blocks in target.layouts.items():
        if align(layout.size * itemsize) <= section_bytes:
            yield Target(target.param, {layout: blocks})
            continue
        for corner, section in _divide_layout(layout, max_elements):
            yield Target(target.param, {section: blocks}, corner)


@lru_cache(maxsize=1024)  # kinds of parameters × blocks of one host
def _divide_layout(layout: Layout, max_elements: int) -> tuple[tuple[tuple[int, ...], Layout], ...]:
    """Divides a block into sections; returns them with the positions of their first elements.

    The block is divided along the axis with the largest stride in the file, so that runs stay long.
    """
    origin = (0,) * len(layout.shape)
    if layout.size <= max_elements or layout.size == 1:
        return ((origin, layout),)
    sections: list[tuple[tuple[int, ...], Layout]] = []
    axis = _slowest_axis(layout)
    middle = layout.shape[axis] // 2
    for low, high in ((0, middle), (middle, layout.shape[axis])):
        start = (*origin[:axis], low, *origin[axis + 1 :])
        stop = (*layout.shape[:axis], high, *layout.shape[axis + 1 :])
        for inner, section in _divide_layout(layout.slice(start, stop), max_elements):
            sections.append((tuple(a + b for a, b in zip(start, inner, strict=True)), section))
    return tuple(sections)


def _slowest_axis(layout: Layout) -> int:
    """The axis longer than 1 with the largest stride in the file."""
    widest = max(layout.pieces, key=lambda piece: max(piece.strides, default=0))
    long = [axis for axis, size in enumerate(layout.shape) if size > 1]
    return max(long, key=lambda axis: widest.strides[axis])


def list_byte_ranges(targets: Iterable[Target]) -> Iterator[ByteRange]:
    """Everything that is read, in order."""
    for target in targets:
        runs_of_records = ((read.source, *run) for read in target.reads for run in read.runs)
        yield from byte_ranges(target.param.view.records, runs_of_records)


# ---- batches

Work = list[tuple[Target, np.ndarray, Read]]  # for one thread: reads, and the buffers they fill


@dataclass(frozen=True)
class Batch:
    """Targets that share one piece of memory and one transfer to the devices.

    Attributes:
      targets: in file order.
      memory: from `Buffers.acquire`.
      buffers: the buffer of each target, a part of `memory`.
    """

    targets: list[Target]
    memory: np.ndarray
    buffers: list[np.ndarray]

    def split_work(self) -> Iterator[Work]:
        """All reads in file order, in lists of about _WORK_BYTES."""
        work: Work = []
        total = 0
        for target, buffer in zip(self.targets, self.buffers, strict=True):
            for read in target.reads:
                work.append((target, buffer, read))
                total += read.size * target.param.source_dtype.itemsize
                if total >= _WORK_BYTES:
                    yield work
                    work, total = [], 0
        if work:
            yield work


def make_batches(targets: Iterable[Target], buffers: Buffers) -> Iterator[Batch]:
    """Batches in file order; the memory of a batch is acquired when the batch is requested."""
    for group in _group(targets, buffers.batch_bytes):
        memory = buffers.acquire(sum(target.size_bytes for target in group))
        parts: list[np.ndarray] = []
        offset = 0
        for target in group:
            parts.append(target.make_buffer(memory[offset:]))
            offset += target.size_bytes
        yield Batch(group, memory, parts)


def _group(targets: Iterable[Target], max_bytes: int) -> Iterator[list[Target]]:
    """Lists of adjacent targets of at most `max_bytes` together; a larger target is alone."""
    group: list[Target] = []
    total = 0
    for target in targets:
        if group and total + target.size_bytes > max_bytes:
            yield group
            group, total = [], 0
        group.append(target)
        total += target.size_bytes
    if group:
        yield group
