"""Compiles the programs for generation in the background while weights are loaded.

One thread traces, which is Python; XLA compiles without the GIL, several programs at once. JAX
caches both: a later call with the same shapes neither traces nor compiles.
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
from dataclasses import astuple, dataclass, replace

from jax.stages import Lowered

from mtj_loader.display import show_value
from mtj_loader.distributed.hosts import Hosts
from mtj_loader.errors import UsageError
from mtj_loader.generation.decode import Programs
from mtj_loader.generation.prompts import PromptRules, Shape, make_shape
from mtj_loader.generation.sampling import SamplingParams
from mtj_loader.loading.load_report import LoadReport
from mtj_loader.models.forward import Forward
from mtj_loader.planning.load_plan import LoadPlan

WarmUp = Sequence[tuple[int, int] | tuple[int, int, int]]
WarmUpLike = WarmUp | Callable[[PromptRules], WarmUp]

# XLA uses two threads or more for each program. With few processors, programs are compiled one by
# one, so that the first token does not wait for programs that only later tokens need.
_COMPILE_THREADS = max(1, min(4, (os.cpu_count() or 1) // 2))

_SWITCH_SECONDS = 0.0005  # a tenth of Python's default; a switch costs about a hundredth of it
_switch_lock = threading.Lock()
_saved_intervals: list[float] = []  # the interval to restore, once for each thread that asked


@dataclass(frozen=True)
class CompiledPrograms:
    """The programs for the first tokens, compiled; those for later tokens may still be compiling.

    Attributes:
      start, end: of the compilation, in seconds of `time.perf_counter`.
      steps: for each shape the compilation of the decoding step.
      failures: the error for each shape that could not be compiled.
    """

    start: float
    end: float
    steps: Mapping[Shape, Future[float]]
    failures: Mapping[Shape, BaseException]

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes without a failure so far."""
        return tuple(shape for shape, step in self.steps.items() if _failure(step) is None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """A warning for each failure."""
        return tuple(_describe_failure(shape, error) for shape, error in self.failures.items())

    @property
    def current(self) -> CompiledPrograms:
        """The same, with the steps that have failed by now moved to the failures."""
        failed = {s: error for s, step in self.steps.items() if (error := _failure(step))}
        steps = {shape: step for shape, step in self.steps.items() if shape not in failed}
        return replace(self, steps=steps, failures={**self.failures, **failed})

    def wait_for_step(self, shape: Shape) -> None:
        """Waits until the step of a shape is compiled; an error is raised again when it runs."""
        if shape in self.steps:
            wait([self.steps[shape]])


NO_PROGRAMS = CompiledPrograms(0.0, 0.0, {}, {})


def read_shapes(warm_up: WarmUpLike, rules: PromptRules, dp: int) -> tuple[Shape, ...]:
    """Reads the `warm_up` argument of `load`.

    Args:
      warm_up: a list of (batch, prompt_length) or (batch, prompt_length, max_new_tokens), or a
        function that returns one.
      rules: what the model accepts as a prompt.
      dp: the size of the mesh axis over which rows are split.

    Raises:
      UsageError: anything else, or a shape that exceeds the model's context.
    """
    items = warm_up(rules) if callable(warm_up) else warm_up
    if not isinstance(items, Sequence):
        raise _invalid_shape(items)
    return tuple(dict.fromkeys(_read_shape(item, rules.max_positions, dp) for item in items))


@contextmanager
def compile_in_background(
    forward: Forward, plan: LoadPlan, shapes: Sequence[Shape]
) -> Iterator[Callable[[], CompiledPrograms]]:
    """Compiles in the background while the body of the `with` statement runs, and afterwards.

    Programs for the first tokens come first; the body gets a function that waits for them. If the
    body raises, no other compilation starts; a running one cannot be stopped and ends by itself.

    Args:
      forward: the model, which caches the compiled programs.
      plan: of the load.
      shapes: of the batches to compile for.
    """
    start = time.perf_counter()
    tracer = ThreadPoolExecutor(1, thread_name_prefix="mtj_loader_trace")
    compilers = ThreadPoolExecutor(_COMPILE_THREADS, thread_name_prefix="mtj_loader_compile")

    def submit(lower: Callable[[], Lowered]) -> Future[float]:
        return compilers.submit(_compile, tracer.submit(_trace, lower))

    try:
        params = plan.abstract_params(forward.mesh) if shapes else {}
        programs = {shape: Programs(forward, params, shape) for shape in shapes}
        first = {
            shape: [submit(lower) for lower in (one.prefill, one.greedy, one.sampled)]
            for shape, one in programs.items()
        }
        steps = {shape: submit(one.step) for shape, one in programs.items()}
        yield lambda: _collect(start, first, steps)
    except BaseException:
        tracer.shutdown(wait=False, cancel_futures=True)
        compilers.shutdown(wait=False, cancel_futures=True)
        raise
    tracer.shutdown(wait=False)
    compilers.shutdown(wait=False)


def keep_common_shapes(compiled: CompiledPrograms, hosts: Hosts) -> CompiledPrograms:
    """Keeps only the shapes that all hosts have compiled: all must run a batch in the same shape.

    Several hosts wait until everything is compiled: they would notice a later failure at different
    times.

    Raises:
      HostError: another host failed, or was late.
    """
    if hosts.count == 1:
        return compiled
    wait(compiled.steps.values())
    compiled = compiled.current
    own = json.dumps([astuple(shape) for shape in compiled.shapes]).encode()
    of_hosts = [json.loads(shapes) for shapes in hosts.gather("compiled shapes", own)]
    common = [s for s in compiled.shapes if all(list(astuple(s)) in one for one in of_hosts)]
    return replace(compiled, steps={shape: compiled.steps[shape] for shape in common})


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


def _trace(lower: Callable[[], Lowered]) -> Lowered:
    with short_switch_interval():
        return lower()


def _compile(traced: Future[Lowered]) -> float:
    """Compiles a program once it is traced; returns the time when it was done."""
    traced.result().compile()
    return time.perf_counter()


def _collect(
    start: float,
    first: Mapping[Shape, Sequence[Future[float]]],
    steps: Mapping[Shape, Future[float]],
) -> CompiledPrograms:
    """Waits for the programs of first tokens. Collects errors: they must not end the load."""
    end, failures = start, {}
    for shape, jobs in first.items():
        try:
            end = max(end, *(job.result() for job in jobs))
        except Exception as error:  # noqa: BLE001
            failures[shape] = error
    ready = {shape: step for shape, step in steps.items() if shape not in failures}
    return CompiledPrograms(start, end, ready, failures).current


def _failure(job: Future[float]) -> BaseException | None:
    """The error of a job that has failed by now, or None."""
    return job.exception() if job.done() and not job.cancelled() else None


def _read_shape(item: object, max_positions: int, dp: int) -> Shape:
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
    return make_shape(batch, longest, new, max_positions, dp)


def _invalid_shape(found: object) -> UsageError:
    return UsageError(
        "cannot compile ahead for this",
        key="warm_up",
        expected="a list of (batch, prompt_length) or (batch, prompt_length, max_new_tokens)",
        found=show_value(found),
    )


def _describe_failure(shape: Shape, error: BaseException) -> str:
    first_line = str(error).strip().partition("\n")[0]
    what = f"a batch of {shape.rows} prompts of up to {shape.prompt} tokens"
    return f"{what} could not be compiled ahead: {type(error).__name__}: {first_line}"


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
