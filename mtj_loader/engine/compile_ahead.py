"""Compiles an engine's programs in the background while weights are loaded.

One thread traces, which is Python; XLA compiles without the GIL, several programs at once.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from jax.stages import Lowered

from mtj_loader.display import show_value
from mtj_loader.distributed.hosts import Hosts
from mtj_loader.engine.engine_programs import Programs
from mtj_loader.engine.keys import INIT, Key, choose_key, prefill_key, step_key
from mtj_loader.engine.scheduler import Decode, Prefill, Scheduler, TokenSequence
from mtj_loader.engine.sizes import Sizes
from mtj_loader.errors import UsageError
from mtj_loader.generation.prompts import PromptRules
from mtj_loader.loading.load_report import LoadReport
from mtj_loader.sampling.params import SamplingParams

Shape = tuple[int, int, int]  # prompts, the longest prompt's tokens, new tokens
WarmUp = Sequence[tuple[int, int] | tuple[int, int, int]]
WarmUpLike = WarmUp | Callable[[PromptRules], WarmUp]

# XLA uses two threads or more for each program. With few processors, programs are compiled one by
# one, so that the first token does not wait for programs that only later tokens need.
_COMPILE_THREADS = max(1, min(4, (os.cpu_count() or 1) // 2))

_LATER = ("step", "decode")  # the programs that no first token needs

_SWITCH_SECONDS = 0.0005  # a tenth of Python's default; a switch costs about a hundredth of it
_switch_lock = threading.Lock()
_saved_intervals: list[float] = []  # the interval to restore, once for each thread that asked


@dataclass(frozen=True)
class CompiledPrograms:
    """The programs for the first tokens, compiled; those for later tokens may still be compiling.

    Attributes:
      start, end: of the compilation of the first ones, in seconds of `time.perf_counter`.
      sizes: of the engine that they are for.
      jobs: the compilation of each program.
      failures: the error for each program that could not be compiled.
    """

    start: float
    end: float
    sizes: Sizes | None
    jobs: Mapping[Key, Future[None]]
    failures: Mapping[Key, BaseException]

    @property
    def keys(self) -> tuple[Key, ...]:
        """The programs without a failure so far."""
        return tuple(key for key, job in self.jobs.items() if _failure(job) is None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """A warning for each failure."""
        return tuple(_describe_failure(key, error) for key, error in self.failures.items())

    @property
    def current(self) -> CompiledPrograms:
        """The same, with the programs that have failed by now moved to the failures."""
        failed = {key: error for key, job in self.jobs.items() if (error := _failure(job))}
        jobs = {key: job for key, job in self.jobs.items() if key not in failed}
        return replace(self, jobs=jobs, failures={**self.failures, **failed})

    def wait(self) -> None:
        """Waits until everything is compiled."""
        wait(self.jobs.values())


NO_PROGRAMS = CompiledPrograms(0.0, 0.0, None, {}, {})


def read_shapes(warm_up: WarmUpLike, rules: PromptRules) -> tuple[Shape, ...]:
    """Reads the `warm_up` argument of `load`.

    Args:
      warm_up: a list of (batch, prompt_length) or (batch, prompt_length, max_new_tokens), or a
        function that returns one.
      rules: what the model accepts as a prompt.

    Raises:
      UsageError: anything else, or a shape that exceeds the model's context.
    """
    items = warm_up(rules) if callable(warm_up) else warm_up
    if not isinstance(items, Sequence):
        raise _invalid_shape(items)
    return tuple(dict.fromkeys(_read_shape(item, rules.max_positions) for item in items))


def sizes_for(shapes: Sequence[Shape], start: Sizes, limit: Sizes) -> Sizes:
    """The sizes of an engine that runs batches of these shapes without growing.

    Args:
      shapes: of the batches.
      start: the engine's sizes without them.
      limit: its largest sizes.
    """
    sizes = start
    for batch, longest, new in shapes:
        sizes = sizes.grown(min(-(-batch // start.groups), limit.slots), longest + new, limit)
    return sizes


def keys_for(shapes: Sequence[Shape], sizes: Sizes) -> tuple[Key, ...]:
    """The programs that an engine needs for batches of these shapes; found by scheduling them.

    Those for the first tokens of all batches come first.
    """
    first: dict[Key, None] = {INIT: None} if shapes else {}
    later: dict[Key, None] = {}
    for batch, longest, new in shapes:
        scheduler = Scheduler(sizes, is_ready=lambda key: key in first or key in later)
        # Enough tokens for all sequences to run at the same time, after the parts of all prompts.
        tokens = min(new, 2 + batch * (2 + longest // sizes.chunks[0].tokens))
        for _ in range(batch):
            scheduler.add(TokenSequence([0] * longest, tokens))
        while (action := scheduler.next_action()) is not None:
            if isinstance(action, Prefill):
                first[prefill_key(action.chunk)] = None
                ended = sum(part.last for part in action.parts)
                if ended:
                    first[choose_key(scheduler.width(choose_key, -(-ended // sizes.groups)))] = None
            else:
                _add_step(action, scheduler, later)
            for sequence in [s for s in scheduler.running if s.length == s.total]:
                scheduler.remove(sequence)
    return (*first, *(key for key in later if key not in first))


def _add_step(action: Decode, scheduler: Scheduler, keys: dict[Key, None]) -> None:
    rows = -(-len(action.rows) // scheduler.sizes.groups)
    keys[step_key(action.width)] = None
    keys[choose_key(scheduler.width(choose_key, rows))] = None


@contextmanager
def compile_in_background(
    programs: Programs, sizes: Sizes, keys: Sequence[Key]
) -> Iterator[Callable[[], CompiledPrograms]]:
    """Compiles in the background while the body of the `with` statement runs, and afterwards.

    Programs that are stored are read instead. The body gets a function that waits for the programs
    that run prompts and choose. If the body raises, no other compilation starts; a running one
    cannot be stopped and ends by itself.

    Args:
      programs: gets the compiled programs.
      sizes: of the engine.
      keys: of the programs, the first needed ones first.
    """
    start = time.perf_counter()
    tracer = ThreadPoolExecutor(1, thread_name_prefix="mtj_loader_trace")
    compilers = ThreadPoolExecutor(_COMPILE_THREADS, thread_name_prefix="mtj_loader_compile")
    ends: dict[Key, float] = {}

    def submit(key: Key) -> Future[None]:
        if programs.is_stored(sizes, key):
            return compilers.submit(make, key, partial(programs.get, sizes, key))
        traced = tracer.submit(_trace, programs, sizes, key)
        compile_traced = partial(programs.put, sizes, key, lambda: traced.result().compile())
        return compilers.submit(make, key, compile_traced)

    def make(key: Key, program: Callable[[], object]) -> None:
        program()
        ends[key] = time.perf_counter()

    try:
        jobs = {key: submit(key) for key in keys}
        first = [key for key in keys if key.kind not in _LATER]
        yield lambda: _collect(start, sizes, jobs, first, ends)
    except BaseException:
        tracer.shutdown(wait=False, cancel_futures=True)
        compilers.shutdown(wait=False, cancel_futures=True)
        raise
    tracer.shutdown(wait=False)
    compilers.shutdown(wait=False)


def keep_common_programs(
    programs: Programs, compiled: CompiledPrograms, hosts: Hosts
) -> CompiledPrograms:
    """Keeps only the programs that all hosts have compiled: all must make the same choices.

    Several hosts wait until everything is compiled: they would notice a later failure at different
    times.

    Raises:
      HostError: another host failed, or was late.
    """
    sizes = compiled.sizes
    if hosts.count == 1 or sizes is None:
        return compiled
    compiled.wait()
    compiled = compiled.current
    own = json.dumps([str(key) for key in compiled.keys]).encode()
    of_hosts = [set(json.loads(names)) for names in hosts.gather("compiled programs", own)]
    common = {key for key in compiled.keys if all(str(key) in names for names in of_hosts)}
    for key in set(compiled.keys) - common:
        programs.discard(sizes, key)
    return replace(compiled, jobs={key: job for key, job in compiled.jobs.items() if key in common})


def add_compile_times(
    report: LoadReport, compiled: CompiledPrograms, load_end: float
) -> LoadReport:
    """Adds the times and warnings of a compilation to the report of the load it ran beside.

    Args:
      report: of the load.
      compiled: during the load.
      load_end: in seconds of `time.perf_counter`.
    """
    load_start = load_end - report.seconds["load"]
    overlap = min(load_end, compiled.end) - max(load_start, compiled.start)
    times = {"compile": compiled.end - compiled.start, "overlap": max(0.0, overlap)}
    warnings = (*report.warnings, *compiled.warnings)
    return replace(report, seconds=report.seconds | times, warnings=warnings)


def _trace(programs: Programs, sizes: Sizes, key: Key) -> Lowered:
    with short_switch_interval():
        return programs.lower(sizes, key)


def _collect(
    start: float,
    sizes: Sizes,
    jobs: Mapping[Key, Future[None]],
    first: Sequence[Key],
    ends: Mapping[Key, float],
) -> CompiledPrograms:
    """Waits for the first programs. Collects errors: they must not end the load."""
    wait([jobs[key] for key in first])
    end = max((ends[key] for key in first if key in ends), default=start)
    return CompiledPrograms(start, end, sizes if jobs else None, jobs, {}).current


def _failure(job: Future[None]) -> BaseException | None:
    """The error of a job that has failed by now, or None."""
    return job.exception() if job.done() and not job.cancelled() else None


def _read_shape(item: object, max_positions: int) -> Shape:
    """Reads one shape; the default of max_new_tokens is that of `generate`."""
    numbers = list(item) if isinstance(item, tuple | list) else []
    if len(numbers) not in (2, 3) or any(type(n) is not int or n < 1 for n in numbers):
        raise _invalid_shape(item)
    batch, longest, *new = numbers
    (new,) = new or [min(SamplingParams.max_new_tokens, max(1, max_positions - longest))]
    if longest + new > max_positions:
        raise UsageError(
            "the prompt and the new tokens exceed the context",
            key="warm_up",
            expected=f"at most {max_positions} tokens in total",
            found=f"{longest} in the prompt + {new} new = {longest + new}",
        )
    return batch, longest, new


def _invalid_shape(found: object) -> UsageError:
    return UsageError(
        "cannot compile ahead for this",
        key="warm_up",
        expected="a list of (batch, prompt_length) or (batch, prompt_length, max_new_tokens)",
        found=show_value(found),
    )


def _describe_failure(key: Key, error: BaseException) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"program {key} could not be compiled ahead: {type(error).__name__}: {first_line}"


@contextmanager
def short_switch_interval() -> Iterator[None]:
    """Makes threads hand over the GIL more often, in the whole process.

    Readers need the GIL for microseconds, hundreds of times a second. A thread that computes in
    Python releases it only on request, by default after 5 ms: loading took four times as long.
    """
    with _switch_lock:
        _saved_intervals.append(
            _saved_intervals[0] if _saved_intervals else sys.getswitchinterval()
        )
        sys.setswitchinterval(min(_saved_intervals[0], _SWITCH_SECONDS))
    try:
        yield
    finally:
        with _switch_lock:
            saved = _saved_intervals.pop()
            if not _saved_intervals:
                sys.setswitchinterval(saved)
