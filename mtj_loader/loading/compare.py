"""Copies of weights against what they are copies of: tied tensors, and what adapters carry."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mtj_loader.checkpoint.record import TensorRecord
from mtj_loader.checkpoint.storage import Storage
from mtj_loader.errors import VerifyError
from mtj_loader.loading.factors import gather
from mtj_loader.loading.ranges import Run
from mtj_loader.loading.read_ahead import Reader, ahead_bytes, reader_for
from mtj_loader.weights.low_rank import CarriedCopy
from mtj_loader.weights.resolve import Comparison
from mtj_loader.weights.view import view_of

_PART_BYTES = 1 << 20  # compared at a time


def compare_tied(
    storage: Storage, comparisons: Iterable[Comparison], host_memory_bytes: int
) -> int:
    """Compares tied copies with the tensors that are used; returns the bytes read.

    Args:
      storage: where all of them are.
      comparisons: each a copy and its original, of the same size.
      host_memory_bytes: for what is read ahead, and what is compared.

    Raises:
      VerifyError: two differ; shows the first byte of both that does.
    """
    parts = [(pair, start) for pair in comparisons for start in _starts(pair)]
    runs = [_run(record, at) for pair, at in parts for record in (pair.copy, pair.original)]
    reader = reader_for(storage, runs, ahead_bytes(storage, host_memory_bytes))
    try:
        for (pair, start), one, other in zip(parts, runs[::2], runs[1::2], strict=True):
            _compare(pair, start, _read(reader, one), _read(reader, other))
    finally:
        reader.stop()
    return sum(stop - start for _, start, stop in runs) + reader.extra_bytes


def compare_carried(storage: Storage, copies: Iterable[CarriedCopy]) -> int:
    """Compares base weights that adapters carry with the checkpoint's; returns the bytes read.

    Args:
      storage: of the checkpoint.
      copies: each with its own storage.

    Raises:
      VerifyError: the values of two differ.
    """
    read_bytes = 0
    for pair in copies:
        copy, original = _values(pair.storage, pair.copy), _values(storage, pair.original)
        if not np.array_equal(copy, original):
            raise VerifyError(
                f"the adapter carries a base weight that differs from {pair.original.name}",
                file=pair.copy.file,
                tensor=pair.copy.name,
            )
        read_bytes += pair.copy.size_bytes + pair.original.size_bytes
    return read_bytes


def _starts(pair: Comparison) -> range:
    return range(0, pair.copy.size_bytes, _PART_BYTES)


def _run(record: TensorRecord, start: int) -> Run:
    """The part of a tensor's bytes that begins there."""
    stop = min(start + _PART_BYTES, record.size_bytes)
    return record.file, record.offset_bytes + start, record.offset_bytes + stop


def _read(reader: Reader, run: Run) -> np.ndarray:
    file, start, stop = run
    data = np.empty(stop - start, np.uint8)
    reader.read_into(file, start, data)
    return data


def _compare(pair: Comparison, start: int, copy: np.ndarray, original: np.ndarray) -> None:
    """Two parts that begin at the same byte of their tensors."""
    if np.array_equal(copy, original):
        return
    at = int(np.argmax(copy != original))
    raise VerifyError(
        f"config.json ties this tensor to {pair.original.name}, and they differ",
        file=pair.copy.file,
        tensor=pair.copy.name,
        expected=f"byte {original[at]:#04x}, as {pair.original.name} has it",
        found=f"byte {copy[at]:#04x} at byte {start + at:,} of the tensor",
        hint='set "tie_word_embeddings": false in config.json if both are meant',
    )


def _values(storage: Storage, record: TensorRecord) -> np.ndarray:
    """A tensor's elements in float32, which holds every weight dtype exactly."""
    return gather(storage, (record,), view_of(record).layout)
