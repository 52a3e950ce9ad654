"""A host's work, cut up: parameters or blocks of them, batches that share memory, and tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np

from mtj_loader.loading import blocks
from mtj_loader.loading.buffers import ALIGNMENT_BYTES, Buffers, aligned
from mtj_loader.loading.schedule import Step, schedule
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.param_plan import ParamPlan
from mtj_loader.weights import kernels
from mtj_loader.weights.copies import shard_copies
from mtj_loader.weights.view import Layout

_TASK_BYTES = 4 << 20  # what a thread takes at a time: many small tensors, or part of a large one

Task = list[tuple["Job", Step]]


@dataclass
class Job:
    """One parameter on this host, or one block of one of its shards.

    Attributes:
      plan: the parameter.
      shards: what is read of it here, each layout once, with the numbers that share it; see
        `ParamPlan.distinct`.
      corner: of a block, where it begins in the shard; None for whole shards.
      is_whole: it has all that this host's devices read of the parameter.
      buffer: flat memory for all of `shards`, in the parameter's dtype.
      targets: each shard's part of it, flat.
    """

    plan: ParamPlan
    shards: Mapping[Layout, Sequence[int]]
    corner: tuple[int, ...] | None = None
    is_whole: bool = False
    buffer: np.ndarray = field(default_factory=partial(np.empty, 0))
    targets: list[np.ndarray] = field(default_factory=list)

    @cached_property
    def finish(self) -> kernels.Finish | None:
        """What is done to each element."""
        return kernels.make_finish(self.plan.source_dtype, self.plan.dtype, self.plan.divisor)

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The reads that fill the buffers."""
        itemsize = self.plan.source_dtype.itemsize
        return schedule(tuple(self.shards), self._spacing, itemsize, self.finish is None)

    @property
    def size_bytes(self) -> int:
        """Memory for its buffer."""
        return self._spacing * len(self.shards) * self.plan.dtype.itemsize

    @cached_property
    def _spacing(self) -> int:
        """Elements from one shard's beginning to the next one's; all have the same size."""
        size = next(iter(self.shards)).size
        return aligned(size * self.plan.dtype.itemsize) // self.plan.dtype.itemsize

    def take_buffer(self, memory: np.ndarray) -> None:
        """Takes the first `size_bytes` of a piece of memory and writes the zeros of padding."""
        self.buffer = memory[: self.size_bytes].view(self.plan.dtype)
        for i, layout in enumerate(self.shards):
            target = self.buffer[i * self._spacing :][: layout.size]
            for box in shard_copies(layout).zeros:
                target.reshape(layout.shape)[box] = 0
            self.targets.append(target)


@dataclass
class Batch:
    """Jobs that share one piece of memory and one call to the devices."""

    jobs: list[Job]
    memory: np.ndarray
    futures: list[Future[None]] = field(default_factory=list)


def batches(plan: LoadPlan, host: int, buffers: Buffers) -> Iterator[Batch]:
    """A host's jobs in file order; a batch's memory is taken when the batch is asked for."""
    for jobs in _grouped(_jobs(plan, host, buffers.block_bytes), buffers.batch_bytes):
        memory = buffers.take(sum(job.size_bytes for job in jobs))
        offset = 0
        for job in jobs:
            job.take_buffer(memory[offset:])
            offset += job.size_bytes
        yield Batch(jobs, memory)


def tasks(jobs: Sequence[Job]) -> Iterator[Task]:
    """The jobs' steps in file order, in lists of about _TASK_BYTES."""
    task: Task = []
    total = 0
    for job in jobs:
        for step in job.steps:
            task.append((job, step))
            total += step.size * job.plan.source_dtype.itemsize
            if total >= _TASK_BYTES:
                yield task
                task, total = [], 0
    if task:
        yield task


def byte_runs(plan: LoadPlan, host: int, buffers: Buffers) -> Iterator[tuple[str, int, int]]:
    """All that a host reads, in order: file, first byte, byte after the last."""
    for job in _jobs(plan, host, buffers.block_bytes):
        itemsize = job.plan.source_dtype.itemsize
        for step in job.steps:
            record = job.plan.view.records[step.source]
            for start, stop in step.runs:
                first = record.offset_bytes + start * itemsize
                yield record.file, first, first + (stop - start) * itemsize


def _jobs(plan: LoadPlan, host: int, block_bytes: int | None) -> Iterator[Job]:
    """This host's part of every parameter, cut up if it is too large for `block_bytes`."""
    device_indices = plan.topology.device_indices_of(host)
    for param in plan.params:
        whole = Job(param, param.distinct(device_indices), is_whole=True)
        if block_bytes is None or whole.size_bytes <= block_bytes:
            yield whole
        else:
            yield from _parts(whole, block_bytes)


def _parts(job: Job, block_bytes: int) -> Iterator[Job]:
    """One job per shard, or several for a shard that is too large itself."""
    for layout, owners in job.shards.items():
        if aligned(layout.size * job.plan.dtype.itemsize) <= block_bytes:
            yield Job(job.plan, {layout: owners})
            continue
        most = block_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES // job.plan.dtype.itemsize
        for corner, block in blocks.cut(layout, most):
            yield Job(job.plan, {block: owners}, corner)


def _grouped(jobs: Iterator[Job], size_bytes: int) -> Iterator[list[Job]]:
    """Runs of jobs of at most this many bytes together; a larger job alone."""
    group: list[Job] = []
    total = 0
    for job in jobs:
        if group and total + job.size_bytes > size_bytes:
            yield group
            group, total = [], 0
        group.append(job)
        total += job.size_bytes
    if group:
        yield group
