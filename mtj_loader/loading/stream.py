"""Executing a plan: files are read in order by a few threads, shards put together and placed.

The main thread deals out batches of parameters and hands finished ones to the devices; the others
read, convert and copy. The first error, or Ctrl-C, stops all of them within a panel's time.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import Mesh

from mtj_loader.errors import NonFiniteError
from mtj_loader.loading.buffers import SCRATCH_BYTES, Buffers, buffers_for
from mtj_loader.loading.jobs import Batch, Job, Task, batches, byte_runs, tasks
from mtj_loader.loading.placement import Params, Placer
from mtj_loader.loading.schedule import CHUNK_BYTES, Step
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.storage.prefetch import prefetch_bytes
from mtj_loader.weights import kernels

_BATCHES_AHEAD = 2  # one is read while one is placed
_MAX_THREADS = 8  # more readers than this gain nothing on one host's storage or memory


@dataclass
class ReadStats:
    """What a thread counts while it works; seconds are its own, so that threads can be summed."""

    bytes_read: int = 0
    read_seconds: float = 0.0
    transform_seconds: float = 0.0
    nonfinite: dict[str, int] = field(default_factory=dict)  # tensor → count

    def add(self, other: ReadStats) -> None:
        """Adds another thread's counts to these."""
        self.bytes_read += other.bytes_read
        self.read_seconds += other.read_seconds
        self.transform_seconds += other.transform_seconds
        for name, count in other.nonfinite.items():
            self.nonfinite[name] = self.nonfinite.get(name, 0) + count


def _threads(host_memory_bytes: int) -> int:
    """As many as there are processors, if half of the memory holds what they need."""
    affordable = host_memory_bytes // 2 // SCRATCH_BYTES
    return max(1, min(_MAX_THREADS, max(2, os.cpu_count() or 1), affordable))


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
        self.host = jax.process_index()
        self.device_seconds = 0.0
        platform = mesh.devices.flat[0].platform
        storage = plan.checkpoint.storage
        ahead = prefetch_bytes(storage, plan.options.host_memory_bytes)
        budget = plan.options.host_memory_bytes - ahead
        self.threads = _threads(budget)
        self._buffers = buffers or buffers_for(platform, budget, self.threads)
        runs = byte_runs(plan, self.host, self._buffers)
        self._reader = storage.reader(runs, ahead)
        self._placer = Placer(plan, mesh, self.host, self._buffers)
        self._tallies: list[ReadStats] = []
        self._local = threading.local()
        self._stop = threading.Event()
        self._error: BaseException | None = None  # the first of any thread

    def run(self) -> Params:
        """Reads everything and returns `params[module][param]`.

        Raises:
          CheckpointError: a file is truncated or gone, or weights are not finite.
          StorageError, MemoryLimitError, DeviceError: the machine failed.
        """
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="mtj_loader")
        try:
            self._stream(pool)
        finally:
            self._stop.set()
            self._reader.stop()
            pool.shutdown(wait=True, cancel_futures=True)
        self._check_finite()
        return self._placer.params()

    def _stream(self, pool: ThreadPoolExecutor) -> None:
        """Deals out all batches, and places each when a later one is under way."""
        pending: deque[Batch] = deque()
        for batch in batches(self.plan, self.host, self._buffers):
            batch.futures = [pool.submit(self._work, task) for task in tasks(batch.jobs)]
            pending.append(batch)
            while len(pending) > _BATCHES_AHEAD:
                self._place(pending.popleft())
        while pending:
            self._place(pending.popleft())

    @property
    def tally(self) -> ReadStats:
        """The sum over all threads."""
        total = ReadStats()
        for tally in self._tallies:
            total.add(tally)
        total.bytes_read += self._reader.extra_bytes
        return total

    def _place(self, batch: Batch) -> None:
        """Waits for a batch to be put together and hands it over."""
        self._wait(batch.futures)
        begun = time.perf_counter()
        self._placer.place(batch)
        self.device_seconds += time.perf_counter() - begun

    def _wait(self, futures: list[Future[None]]) -> None:
        waiting: set[Future[None]] = set(futures)
        while waiting:
            _, waiting = wait(waiting, timeout=0.1)  # so that the progress bar moves
            if self._error is not None:  # perhaps of a later batch; all threads stop for it
                raise self._error
            self.progress(sum(tally.bytes_read for tally in self._tallies))

    def _work(self, task: Task) -> None:
        """One thread's share."""
        try:
            self._run(task)
        except BaseException as error:  # noqa: BLE001 -- raised again by the main thread
            self._error = self._error or error
            self._stop.set()

    def _run(self, task: Task) -> None:
        """Reads, converts, copies."""
        for job, step in task:
            if self._stop.is_set():
                return
            if step.direct:
                self._read_direct(job, step)
            else:
                self._read_chunk(job, step)

    def _read_direct(self, job: Job, step: Step) -> None:
        first = step.copies[0].dst
        target = job.buffer[first : first + step.size]
        self._read(job, step.source, step.start, target)
        self._scan(job, step.source, target, None)

    def _read_chunk(self, job: Job, step: Step) -> None:
        itemsize = job.plan.source_dtype.itemsize
        chunk = self._scratch(step.span * itemsize).view(job.plan.source_dtype)
        for start, stop in step.runs:
            run = chunk[start - step.start : stop - step.start]
            self._read(job, step.source, start, run)
        begun = time.perf_counter()
        ready = chunk if job.finish is None else job.finish(chunk)
        for start, stop in step.runs:
            inside = slice(start - step.start, stop - step.start)
            self._scan(job, step.source, chunk[inside], None if ready is chunk else ready[inside])
        for copy in step.copies:
            kernels.run_copy(copy, ready, step.start, job.buffer)
        self._mine.transform_seconds += time.perf_counter() - begun

    def _read(self, job: Job, source: int, first: int, target: np.ndarray) -> None:
        record = job.plan.view.records[source]
        offset_bytes = record.offset_bytes + first * target.itemsize
        begun = time.perf_counter()
        self._reader.read_into(record.file, offset_bytes, target.view(np.uint8))
        self._mine.read_seconds += time.perf_counter() - begun
        self._mine.bytes_read += target.nbytes

    def _scan(self, job: Job, source: int, before: np.ndarray, after: np.ndarray | None) -> None:
        """Counts what is not finite, and refuses finite values that a dtype change overflowed."""
        name = job.plan.view.records[source].name
        if after is not None and (count := kernels.count_overflows(before, after)):
            raise NonFiniteError(
                f"finite values overflow when they become {job.plan.dtype.name}",
                tensor=name,
                found=f"{count} or more",
                hint="another dtype holds them: float32 all, bfloat16 nearly all",
            )
        if self.plan.options.check_finite and (count := kernels.count_nonfinite(before)):
            found = self._mine.nonfinite
            found[name] = found.get(name, 0) + count

    @property
    def _mine(self) -> ReadStats:
        """This thread's tally."""
        if not hasattr(self._local, "tally"):
            self._local.tally = ReadStats()
            self._tallies.append(self._local.tally)
        return self._local.tally

    def _scratch(self, size_bytes: int) -> np.ndarray:
        """This thread's scratch memory."""
        if getattr(self._local, "scratch", np.empty(0)).size < size_bytes:
            self._local.scratch = np.empty(max(size_bytes, CHUNK_BYTES), np.uint8)
        return self._local.scratch[:size_bytes]

    def _check_finite(self) -> None:
        found = self.tally.nonfinite
        if found and not self.plan.options.allow_nonfinite:
            name, count = next(iter(found.items()))
            raise NonFiniteError(
                f"{sum(found.values())} weights in {len(found)} tensors are NaN or infinite",
                tensor=name,
                found=f"{count} there",
                hint="allow_nonfinite loads them all the same",
            )
