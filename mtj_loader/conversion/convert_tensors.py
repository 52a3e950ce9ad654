"""Converting the tensors: read, changed and written panel by panel, by a few threads."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtj_loader.conversion.casting import SOURCES, Losses, cast
from mtj_loader.conversion.output_folder import write_at
from mtj_loader.conversion.output_layout import Move
from mtj_loader.dtypes import BITS
from mtj_loader.formats.records import TensorRecord
from mtj_loader.formats.safetensors import check_bool_bytes
from mtj_loader.storage.base import Storage

CHUNK_BYTES = 1 << 20  # stays in cache between the read, the cast and the write
_CHUNKS_A_TURN = 64  # few enough that progress is seen, enough that turns cost nothing
_MAX_THREADS = 8  # of one host's storage more gain nothing


@dataclass(frozen=True)
class _Turn:
    """What a thread does at a time: elements `start` to `stop` of a tensor."""

    move: Move
    start: int
    stop: int


def convert_tensors(
    storage: Storage,
    moves: Sequence[Move],
    folder: Path,
    *,
    clamp: bool,
    progress: Callable[[int], None],
) -> dict[str, Losses]:
    """Writes every tensor to its place in the files of a folder.

    What is in memory at any time are three panels for each thread, whatever the model's size.

    Args:
      storage: where the tensors are.
      moves: tensors, contiguous in their files, and where they go.
      folder: where the files are; what is not there is made.
      clamp: see `casting.cast`.
      progress: called with the bytes read so far.

    Returns:
      Losses by tensor.

    Raises:
      CheckpointError, StorageError: a read or a write failed.
    """
    stop = threading.Event()
    losses = {move.source.name: Losses() for move in moves}
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="mtj_loader")
    done_bytes = 0
    try:
        turns = [turn for move in moves for turn in _turns(move)]
        futures = [pool.submit(_run, turn, storage, folder, clamp, stop) for turn in turns]
        for turn, future in zip(turns, futures, strict=True):
            name = turn.move.source.name
            losses[name] += future.result()
            done_bytes += (turn.stop - turn.start) * BITS[turn.move.source.dtype] // 8
            progress(done_bytes)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
    return losses


def _turns(move: Move) -> Iterator[_Turn]:
    elements, step = math.prod(move.source.shape), _CHUNKS_A_TURN * _chunk_elements(move)
    for start in range(0, elements, step):
        yield _Turn(move, start, min(start + step, elements))


def _run(turn: _Turn, storage: Storage, folder: Path, clamp: bool, stop: threading.Event) -> Losses:
    source, target = turn.move.source, turn.move.target
    losses = Losses()
    step = _chunk_elements(turn.move)
    for start in range(turn.start, turn.stop, step):
        if stop.is_set():
            break
        chunk = _read(storage, source, start, min(step, turn.stop - start))
        if source.dtype in SOURCES:
            chunk, lost = cast(chunk, SOURCES[target.dtype], clamp=clamp)
            losses += lost
        at_bytes = target.offset_bytes + start * chunk.itemsize
        write_at(folder / target.file, at_bytes, chunk.view(np.uint8).data)
    return losses


def _read(storage: Storage, record: TensorRecord, start: int, count: int) -> np.ndarray:
    """Elements of a tensor; unsigned integers stand for all that is only copied."""
    dtype = SOURCES.get(record.dtype, np.dtype(f"u{BITS[record.dtype] // 8}"))
    chunk = np.empty(count, dtype)
    at_bytes = record.offset_bytes + start * dtype.itemsize
    storage.read_into(record.file, at_bytes, chunk.view(np.uint8))
    if record.dtype == "BOOL":
        check_bool_bytes(record, chunk, start)
    return chunk


def _chunk_elements(move: Move) -> int:
    return CHUNK_BYTES * 8 // BITS[move.source.dtype]
