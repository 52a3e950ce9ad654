"""Converting tensors: threads read, cast and write them in chunks."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtj_loader.conversion.casting import SOURCE_DTYPES, Losses, cast
from mtj_loader.conversion.convert_plan import TensorConversion
from mtj_loader.conversion.output_folder import write_at
from mtj_loader.dtypes import BITS
from mtj_loader.formats.records import TensorRecord
from mtj_loader.formats.safetensors import check_bool_bytes
from mtj_loader.storage.base import Storage

CHUNK_BYTES = 1 << 20  # fits into the CPU cache between the read, the cast and the write
_CHUNKS_PER_PART = 64  # small enough for the progress bar, large enough to hide the overhead
_MAX_THREADS = 8  # more threads do not make the storage of one host faster


@dataclass(frozen=True)
class _Part:
    """Elements `start` to `stop` of a tensor, which one thread converts."""

    tensor: TensorConversion
    start: int
    stop: int


def convert_tensors(
    storage: Storage,
    tensors: Sequence[TensorConversion],
    folder: Path,
    *,
    clamp: bool,
    progress: Callable[[int], None],
) -> dict[str, Losses]:
    """Writes every tensor to its place in the files of a folder.

    Memory use is three chunks per thread, independent of the model's size.

    Args:
      storage: of the source.
      tensors: their places in the source, where they are contiguous, and in the output.
      folder: the output; missing files are created.
      clamp: see `casting.cast`.
      progress: called with the number of bytes converted so far.

    Returns:
      Losses by the name of the tensor.

    Raises:
      CheckpointError, StorageError: a read or a write failed.
    """
    stop = threading.Event()
    losses = {tensor.source.name: Losses() for tensor in tensors}
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="mtj_loader")
    done_bytes = 0
    try:
        parts = [part for tensor in tensors for part in _split_tensor(tensor)]
        futures = [pool.submit(_convert_part, part, storage, folder, clamp, stop) for part in parts]
        for part, future in zip(parts, futures, strict=True):
            source = part.tensor.source
            losses[source.name] += future.result()
            done_bytes += (part.stop - part.start) * BITS[source.dtype] // 8
            progress(done_bytes)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
    return losses


def _split_tensor(tensor: TensorConversion) -> Iterator[_Part]:
    elements = math.prod(tensor.source.shape)
    step = _CHUNKS_PER_PART * _count_chunk_elements(tensor)
    for start in range(0, elements, step):
        yield _Part(tensor, start, min(start + step, elements))


def _convert_part(
    part: _Part, storage: Storage, folder: Path, clamp: bool, stop: threading.Event
) -> Losses:
    source, target = part.tensor.source, part.tensor.target
    losses = Losses()
    step = _count_chunk_elements(part.tensor)
    for start in range(part.start, part.stop, step):
        if stop.is_set():
            break
        chunk = _read_chunk(storage, source, start, min(step, part.stop - start))
        if source.dtype in SOURCE_DTYPES:
            chunk, lost = cast(chunk, SOURCE_DTYPES[target.dtype], clamp=clamp)
            losses += lost
        at_bytes = target.offset_bytes + start * chunk.itemsize
        write_at(folder / target.file, at_bytes, chunk.view(np.uint8).data)
    return losses


def _read_chunk(storage: Storage, record: TensorRecord, start: int, count: int) -> np.ndarray:
    """Reads elements of a tensor; those of kept dtypes are read as unsigned integers."""
    dtype = SOURCE_DTYPES.get(record.dtype, np.dtype(f"u{BITS[record.dtype] // 8}"))
    chunk = np.empty(count, dtype)
    at_bytes = record.offset_bytes + start * dtype.itemsize
    storage.read_into(record.file, at_bytes, chunk.view(np.uint8))
    if record.dtype == "BOOL":
        check_bool_bytes(record, chunk, start)
    return chunk


def _count_chunk_elements(tensor: TensorConversion) -> int:
    return CHUNK_BYTES * 8 // BITS[tensor.source.dtype]
