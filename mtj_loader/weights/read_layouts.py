"""Reads the elements that small layouts need, as float32: LoRA factors, and slabs to compare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mtj_loader import dtypes
from mtj_loader.dtypes import FLOAT32
from mtj_loader.formats.records import TensorRecord
from mtj_loader.storage.base import ByteRange, Reader, Storage
from mtj_loader.weights import kernels
from mtj_loader.weights.copies import clip, runs, shard_copies
from mtj_loader.weights.view import Layout

ElementRange = tuple[int, int, int]  # index of a record, first element, one past the last


def read_layout(
    source: Storage | Reader, records: Sequence[TensorRecord], layout: Layout
) -> np.ndarray:
    """Reads one layout as a float32 array of its shape, and only the elements that it needs."""
    ranges = element_ranges((layout,), len(records), merge=False)
    return read_layouts(source, records, (layout,), ranges)[0]


def read_layouts(
    source: Storage | Reader,
    records: Sequence[TensorRecord],
    layouts: Sequence[Layout],
    ranges: Iterable[ElementRange],
) -> list[np.ndarray]:
    """Reads several layouts of the same records; elements that they share are read once.

    Args:
      source: where to read.
      records: the tensors.
      layouts: which of their elements go where.
      ranges: what to read; see `element_ranges`.
    """
    targets = [np.zeros(layout.size, FLOAT32) for layout in layouts]
    copies = [shard_copies(layout).copies for layout in layouts]
    for i, start, stop in ranges:
        record, dtype = records[i], _dtype(records[i])
        run = np.empty(stop - start, dtype)
        offset_bytes = record.offset_bytes + start * dtype.itemsize
        source.read_into(record.file, offset_bytes, run.view(np.uint8))
        wide = kernels.cast(run, FLOAT32)
        for target, target_copies in zip(targets, copies, strict=True):
            for copy in (copy for copy in target_copies if copy.source == i):
                for part in clip(copy, start, stop):
                    kernels.execute_copy(part, wide, start, target)
    return [target.reshape(layout.shape) for target, layout in zip(targets, layouts, strict=True)]


def element_ranges(layouts: Sequence[Layout], records: int, *, merge: bool) -> list[ElementRange]:
    """The elements that layouts of the same records need, in the order in which they are read.

    Args:
      layouts: which elements.
      records: the number of records.
      merge: read each record from its first to its last needed element, with the gaps between.
    """
    copies = [copy for layout in layouts for copy in shard_copies(layout).copies]
    found: list[ElementRange] = []
    for i in range(records):
        ranges = runs(tuple(copy for copy in copies if copy.source == i)).tolist()
        if merge and ranges:
            ranges = [(ranges[0][0], ranges[-1][1])]
        found += [(i, start, stop) for start, stop in ranges]
    return found


def byte_ranges(
    records: Sequence[TensorRecord], ranges: Iterable[ElementRange]
) -> Iterator[ByteRange]:
    """The same ranges in bytes of the files."""
    for i, start, stop in ranges:
        first, itemsize = records[i].offset_bytes, _dtype(records[i]).itemsize
        yield records[i].file, first + start * itemsize, first + stop * itemsize


def _dtype(record: TensorRecord) -> np.dtype:
    return dtypes.WEIGHT_DTYPES[record.dtype]
