"""Compares copies of weights with their originals: tied tensors, and base weights in adapters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from mtj_loader.errors import VerifyError
from mtj_loader.formats.records import TensorRecord
from mtj_loader.lora.low_rank import BaseWeightCopy
from mtj_loader.storage.base import ByteRange, Reader, Storage
from mtj_loader.storage.prefetch import prefetch_bytes, range_bytes
from mtj_loader.weights.read_layouts import read_layout
from mtj_loader.weights.resolve import Comparison
from mtj_loader.weights.view import view_of

_SLAB_ELEMENTS = 2 << 20  # of a base weight in an adapter; two float32 slabs take 16 MiB


def compare_tied(
    storage: Storage, comparisons: Iterable[Comparison], host_memory_bytes: int
) -> int:
    """Compares tied copies with the tensors that are used; returns the bytes read.

    Args:
      storage: the storage of all of them.
      comparisons: pairs of a copy and its original, of the same size.
      host_memory_bytes: the limit for prefetching and comparing.

    Raises:
      VerifyError: two differ; the message shows the first byte that does.
    """
    budget_bytes = prefetch_bytes(storage, host_memory_bytes)
    part_bytes = range_bytes(storage, budget_bytes)
    parts = [
        (
            pair,
            start,
            _byte_range(pair.copy, start, part_bytes),
            _byte_range(pair.original, start, part_bytes),
        )
        for pair in comparisons
        for start in range(0, pair.copy.size_bytes, part_bytes)
    ]
    ranges = [one for _, _, *both in parts for one in both]
    reader = storage.reader(ranges, budget_bytes)
    try:
        for pair, start, copy, original in parts:
            _compare(pair, start, _read(reader, copy), _read(reader, original))
    finally:
        reader.stop()
    return sum(stop - start for _, start, stop in ranges) + reader.extra_bytes


def compare_base_weight(storage: Storage, pair: BaseWeightCopy) -> int:
    """Compares a base weight in an adapter with the checkpoint's; returns the bytes read.

    Args:
      storage: the checkpoint's.
      pair: both tensors, of the same shape, and the storage of the copy.

    Raises:
      VerifyError: their values differ.
    """
    slabs = zip(_slabs(pair.storage, pair.copy), _slabs(storage, pair.original), strict=True)
    if not all(np.array_equal(copy, original, equal_nan=True) for copy, original in slabs):
        raise VerifyError(
            f"the adapter contains a base weight that differs from {pair.original.name}",
            file=pair.copy.file,
            tensor=pair.copy.name,
        )
    return pair.copy.size_bytes + pair.original.size_bytes


def _byte_range(record: TensorRecord, start: int, part_bytes: int) -> ByteRange:
    """The part of a tensor's bytes that begins at `start`."""
    stop = min(start + part_bytes, record.size_bytes)
    return record.file, record.offset_bytes + start, record.offset_bytes + stop


def _read(reader: Reader, byte_range: ByteRange) -> np.ndarray:
    file, start, stop = byte_range
    data = np.empty(stop - start, np.uint8)
    reader.read_into(file, start, data)
    return data


def _compare(pair: Comparison, start: int, copy: np.ndarray, original: np.ndarray) -> None:
    """Compares two parts that begin at byte `start` of their tensors."""
    if np.array_equal(copy, original):
        return
    at = int(np.argmax(copy != original))
    raise VerifyError(
        f"config.json ties this tensor to {pair.original.name}, and they differ",
        file=pair.copy.file,
        tensor=pair.copy.name,
        expected=f"byte {original[at]:#04x}, as in {pair.original.name}",
        found=f"byte {copy[at]:#04x} at byte {start + at:,} of the tensor",
        hint='if both are needed, set "tie_word_embeddings": false in config.json',
    )


def _slabs(storage: Storage, record: TensorRecord) -> Iterator[np.ndarray]:
    """A tensor as slabs of rows in float32, which represents every weight dtype exactly."""
    layout = view_of(record).layout
    rows, *rest = layout.shape  # an adapted tensor has at least one axis
    step = max(1, _SLAB_ELEMENTS // max(1, math.prod(rest)))
    for first in range(0, rows, step):
        start, stop = [first, *(0 for _ in rest)], [min(first + step, rows), *rest]
        yield read_layout(storage, (record,), layout.slice(start, stop))
