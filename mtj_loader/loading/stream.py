"""Executes a plan's schedule: a few threads read in file order, and full batches are placed.

The main thread gives work to the reading threads and transfers complete batches to the devices. The
reading threads read, convert and copy. The first error, or Ctrl-C, stops all threads after at most
one read.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import Mesh

from mtj_loader.errors import NonFiniteError
from mtj_loader.loading.buffers import SCRATCH_BYTES, Buffers, buffers_for
from mtj_loader.loading.placement import Params, Placer
from mtj_loader.loading.schedule import (
    CHUNK_BYTES,
    Batch,
    Read,
    Target,
    Work,
    list_byte_ranges,
    list_targets,
    make_batches,
)
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.storage.prefetch import prefetch_bytes
from mtj_loader.weights import kernels

_BATCHES_AHEAD = 2  # one is read while one is placed
_MAX_THREADS = 8  # more readers gain nothing with one host's storage or memory


@dataclass
class ReadStats:
    """Counts of one thread, or of all threads together; seconds are summed over threads."""

    bytes_read: int = 0
    read_seconds: float = 0.0
    transform_seconds: float = 0.0
    nonfinite: Counter[str] = field(default_factory=Counter)  # by tensor

    def add(self, other: ReadStats) -> None:
        """Adds another thread's counts to these."""
        self.bytes_read += other.bytes_read
        self.read_seconds += other.read_seconds
        self.transform_seconds += other.transform_seconds
        self.nonfinite.update(other.nonfinite)


class Streamer:
    """Loads the shards of one host's devices.

    Args:
      plan: what to load.
      mesh: the devices; axes dp and mp, Auto.
      progress: called with the bytes read so far, from the main thread.
      buffers: the memory policy; by default the one for the mesh's backend.
    """

    def __init__(
        self,
        plan: LoadPlan,
        mesh: Mesh,
        progress: Callable[[int], None] = lambda done: None,
        buffers: Buffers | None = None,
    ) -> None:
        self.plan, self.progress = plan, progress
        self.device_seconds = 0.0
        host, storage = jax.process_index(), plan.checkpoint.storage
        ahead = prefetch_bytes(storage, plan.options.host_memory_bytes)
        budget = plan.options.host_memory_bytes - ahead
        self.threads = _thread_count(budget)
        self._buffers = buffers or buffers_for(mesh.devices.flat[0].platform, budget, self.threads)
        self._targets = list_targets(plan, host, self._buffers.section_bytes)
        self._reader = storage.reader(list_byte_ranges(self._targets), ahead)
        self._placer = Placer(plan, mesh, host, self._buffers)
        self._thread_stats: list[ReadStats] = []
        self._local = threading.local()
        self._stop = threading.Event()
        self._error: BaseException | None = None  # the first of any thread

    def run(self) -> Params:
        """Reads everything and returns `params[module][param]`.

        Raises:
          CheckpointError: a file is truncated or missing, or weights are not finite.
          StorageError, MemoryLimitError, DeviceError: the machine failed.
        """
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="mtj_loader")
        try:
            self._stream(pool)
            self._check_finite()
            return self._placer.params()
        except BaseException:
            self._placer.clear()  # see `release_on_failure`
            raise
        finally:
            self._stop.set()
            self._reader.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            self._error = None  # its traceback refers to this object

    @property
    def stats(self) -> ReadStats:
        """The counts of all threads together."""
        total = ReadStats(bytes_read=self._reader.extra_bytes)
        for stats in self._thread_stats:
            total.add(stats)
        return total

    # ---- the main thread

    def _stream(self, pool: ThreadPoolExecutor) -> None:
        """Submits all batches, and places each while later ones are read."""
        pending: deque[tuple[Batch, list[Future[None]]]] = deque()
        for batch in make_batches(self._targets, self._buffers):
            pending.append((batch, [pool.submit(self._work, work) for work in batch.split_work()]))
            while len(pending) > _BATCHES_AHEAD:
                self._place(*pending.popleft())
        while pending:
            self._place(*pending.popleft())

    def _place(self, batch: Batch, futures: list[Future[None]]) -> None:
        """Waits until a batch is complete, and transfers it."""
        self._wait(futures)
        started = time.perf_counter()
        self._placer.place(batch)
        self.device_seconds += time.perf_counter() - started

    def _wait(self, futures: list[Future[None]]) -> None:
        waiting: set[Future[None]] = set(futures)
        while waiting:
            _, waiting = wait(waiting, timeout=0.1)  # so that the progress bar moves
            if self._error is not None:  # possibly of a later batch; it stops all threads
                raise self._error
            self.progress(sum(stats.bytes_read for stats in self._thread_stats))

    def _check_finite(self) -> None:
        found = self.stats.nonfinite
        if found and not self.plan.options.allow_nonfinite:
            name, count = next(iter(found.items()))
            raise NonFiniteError(
                f"{sum(found.values())} weights in {len(found)} tensors are NaN or infinite",
                file=self.plan.checkpoint.index.records[name].file,
                tensor=name,
                found=f"{count} in this tensor",
                hint="allow_nonfinite loads them anyway",
            )

    # ---- the reading threads

    def _work(self, work: Work) -> None:
        """Executes reads until an error in any thread."""
        try:
            for target, buffer, read in work:
                if self._stop.is_set():
                    return
                execute = self._read_direct if read.is_direct else self._read_chunk
                execute(target, buffer, read)
        except BaseException as error:  # noqa: BLE001 -- raised again by the main thread
            self._error = self._error or error
            self._stop.set()

    def _read_direct(self, target: Target, buffer: np.ndarray, read: Read) -> None:
        first = read.copies[0].dst
        elements = buffer[first : first + read.size]
        self._read(target, read.source, read.start, elements)
        self._check_values(target, read.source, elements, None)

    def _read_chunk(self, target: Target, buffer: np.ndarray, read: Read) -> None:
        dtype, convert = target.param.source_dtype, target.convert
        chunk = self._scratch(read.span * dtype.itemsize).view(dtype)
        inside = [slice(start - read.start, stop - read.start) for start, stop in read.runs]
        for (start, _), run in zip(read.runs, inside, strict=True):
            self._read(target, read.source, start, chunk[run])
        started = time.perf_counter()
        converted = chunk if convert is None else convert(chunk)
        for run in inside:
            after = None if convert is None else converted[run]
            self._check_values(target, read.source, chunk[run], after)
        for copy in read.copies:
            kernels.execute_copy(copy, converted, read.start, buffer)
        self._stats.transform_seconds += time.perf_counter() - started

    def _read(self, target: Target, source: int, first: int, elements: np.ndarray) -> None:
        """Reads elements of a record, starting with element `first`."""
        record = target.param.view.records[source]
        offset_bytes = record.offset_bytes + first * elements.itemsize
        started = time.perf_counter()
        self._reader.read_into(record.file, offset_bytes, elements.view(np.uint8))
        self._stats.read_seconds += time.perf_counter() - started
        self._stats.bytes_read += elements.nbytes

    def _check_values(
        self, target: Target, source: int, before: np.ndarray, after: np.ndarray | None
    ) -> None:
        """Counts NaN and infinity; rejects finite values that overflow in the parameter's dtype."""
        record = target.param.view.records[source]
        if after is not None and (count := kernels.count_overflows(before, after)):
            raise NonFiniteError(
                f"finite values overflow when they become {target.param.dtype.name}",
                file=record.file,
                tensor=record.name,
                found=f"{count} or more",
                hint="use another dtype: float32 holds all values, bfloat16 nearly all",
            )
        if self.plan.options.check_finite and (count := kernels.count_nonfinite(before)):
            self._stats.nonfinite[record.name] += count

    @property
    def _stats(self) -> ReadStats:
        """This thread's counts."""
        if not hasattr(self._local, "stats"):
            self._local.stats = ReadStats()
            self._thread_stats.append(self._local.stats)
        return self._local.stats

    def _scratch(self, size_bytes: int) -> np.ndarray:
        """This thread's scratch memory."""
        if getattr(self._local, "scratch", np.empty(0)).size < size_bytes:
            self._local.scratch = np.empty(max(size_bytes, CHUNK_BYTES), np.uint8)
        return self._local.scratch[:size_bytes]


def _thread_count(host_memory_bytes: int) -> int:
    """One thread per processor, as far as half of the memory is enough for their scratch memory."""
    affordable = host_memory_bytes // 2 // SCRATCH_BYTES
    return max(1, min(_MAX_THREADS, max(2, os.cpu_count() or 1), affordable))
