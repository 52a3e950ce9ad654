"""Compiling ahead: what text needs is compiled in the background while weights are read.

Tracing is Python, and one thread does it; XLA compiles outside of Python's lock, several programs
at once. JAX remembers what it compiled: a later call neither traces nor compiles again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace

from jax.stages import Lowered

from mtj_loader.distributed.hosts import Hosts
from mtj_loader.errors import UsageError
from mtj_loader.generation.batch import Shape, make_shape
from mtj_loader.generation.decode import Programs
from mtj_loader.generation.gil import quick_turns
from mtj_loader.generation.prompts import PromptRules
from mtj_loader.generation.sampling import SamplingParams
from mtj_loader.loading.load_report import LoadReport
from mtj_loader.loading.placement import abstract_params
from mtj_loader.models.forward import Forward
from mtj_loader.planning.load_plan import LoadPlan

WarmUp = Sequence[tuple[int, int] | tuple[int, int, int]]
WarmUpLike = WarmUp | Callable[[PromptRules], WarmUp]

# The programs of one shape at once, where there are processors for it: XLA itself takes two threads
# and more for each. Where there are not, the first token need not wait for what later ones need.
_COMPILERS = max(1, min(4, (os.cpu_count() or 1) // 2))


@dataclass(frozen=True)
class Compiled:
    """What was compiled ahead, as far as the first tokens need it; the rest is still under way.

    Attributes:
      begun, ended: in seconds of `time.perf_counter`.
      steps: shape → the compilation of what makes all tokens but the first.
      failures: why other shapes are not ready.
    """

    begun: float
    ended: float
    steps: Mapping[Shape, Future[float]]
    failures: Mapping[Shape, BaseException]

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Those of which nothing failed so far."""
        return tuple(shape for shape, step in self.steps.items() if _failure(step) is None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The failures in words."""
        return tuple(_in_words(shape, error) for shape, error in self.failures.items())

    @property
    def so_far(self) -> Compiled:
        """The same, with the steps that have failed by now among the failures."""
        failed = {s: error for s, step in self.steps.items() if (error := _failure(step))}
        steps = {shape: step for shape, step in self.steps.items() if shape not in failed}
        return replace(self, steps=steps, failures={**self.failures, **failed})

    def wait_for_step(self, shape: Shape) -> None:
        """Waits for its compilation; what failed there will fail again where it is run."""
        if shape in self.steps:
            wait([self.steps[shape]])


NOTHING = Compiled(0.0, 0.0, {}, {})


def read_shapes(wanted: WarmUpLike, rules: PromptRules, dp: int) -> tuple[Shape, ...]:
    """What callers ask to be compiled, as shapes of batches.

    Args:
      wanted: (batch, prompt_length) or (batch, prompt_length, max_new_tokens), each as often as
        wanted, or a function that gives these.
      rules: what the model accepts.
      dp: the mesh axis that rows are split over.

    Raises:
      UsageError: something else, or a shape that does not fit into the model.
    """
    items = wanted(rules) if callable(wanted) else wanted
    if not isinstance(items, Sequence):
        raise _not_a_shape(items)
    return tuple(dict.fromkeys(_read(item, rules.max_positions, dp) for item in items))


@contextmanager
def compiling(
    forward: Forward, plan: LoadPlan, shapes: Sequence[Shape]
) -> Iterator[Callable[[], Compiled]]:
    """Compiles in the background while the body runs, and afterwards.

    First comes what the first tokens need. The body gets a function that waits for that. If it
    fails, nothing new is begun, and nobody waits: a compilation that is under way cannot be
    stopped, and ends by itself.

    Args:
      forward: the model; what is compiled stays with it.
      plan: what is being loaded for it.
      shapes: of the batches to compile for.
    """
    begun = time.perf_counter()
    tracer = ThreadPoolExecutor(1, thread_name_prefix="mtj_loader_trace")
    compilers = ThreadPoolExecutor(_COMPILERS, thread_name_prefix="mtj_loader_compile")

    def compiled(lower: Callable[[], Lowered]) -> Future[float]:
        return compilers.submit(_compile, tracer.submit(_trace, lower))

    try:
        params = abstract_params(plan, forward.mesh) if shapes else {}
        made = {shape: Programs(forward, params, shape) for shape in shapes}
        first = {
            shape: [compiled(lower) for lower in (of.prefill, of.greedy, of.sampled)]
            for shape, of in made.items()
        }
        steps = {shape: compiled(of.step) for shape, of in made.items()}
        yield lambda: _collect(begun, first, steps)
    except BaseException:
        tracer.shutdown(wait=False, cancel_futures=True)
        compilers.shutdown(wait=False, cancel_futures=True)
        raise
    tracer.shutdown(wait=False)
    compilers.shutdown(wait=False)


def on_all_hosts(compiled: Compiled, hosts: Hosts) -> Compiled:
    """Without the shapes that another host has not: all have to run a batch in the same.

    Therefore several hosts wait until everything is compiled: a failure that shows later would
    show on each at another time.

    Raises:
      HostError: another host failed, or did not come in time.
    """
    if hosts.count == 1:
        return compiled
    wait(compiled.steps.values())
    compiled = compiled.so_far
    mine = json.dumps([astuple(shape) for shape in compiled.shapes]).encode()
    theirs = [json.loads(shapes) for shapes in hosts.gather("warm shapes", mine)]
    everywhere = [s for s in compiled.shapes if all(list(astuple(s)) in one for one in theirs)]
    return replace(compiled, steps={shape: compiled.steps[shape] for shape in everywhere})


def reported(report: LoadReport, compiled: Compiled, loaded: float) -> LoadReport:
    """The report of a load during which this was compiled.

    Args:
      report: of the load.
      compiled: beside it.
      loaded: when the load ended, in seconds of `time.perf_counter`.
    """
    load_begun = loaded - report.seconds["load"]
    together = min(loaded, compiled.ended) - max(load_begun, compiled.begun)
    times = {"compile": compiled.ended - compiled.begun, "overlap": max(0.0, together)}
    warnings = (*report.warnings, *compiled.warnings)
    return replace(report, seconds=report.seconds | times, warnings=warnings)


def _trace(lower: Callable[[], Lowered]) -> Lowered:
    with quick_turns():
        return lower()


def _compile(traced: Future[Lowered]) -> float:
    """Compiles a program once it is traced; returns when that was done."""
    traced.result().compile()
    return time.perf_counter()


def _collect(
    begun: float,
    first: Mapping[Shape, Sequence[Future[float]]],
    steps: Mapping[Shape, Future[float]],
) -> Compiled:
    """Waits for what first tokens need; a failure is told, for the load beside it is worth more."""
    ended, failures = begun, {}
    for shape, jobs in first.items():
        try:
            ended = max(ended, *(job.result() for job in jobs))
        except Exception as error:  # noqa: BLE001
            failures[shape] = error
    ready = {shape: step for shape, step in steps.items() if shape not in failures}
    return Compiled(begun, ended, ready, failures).so_far


def _failure(job: Future[float]) -> BaseException | None:
    """Why a job failed, if it has by now."""
    return job.exception() if job.done() and not job.cancelled() else None


def _read(item: object, max_positions: int, dp: int) -> Shape:
    """A shape as callers write it, where what it leaves out is as `generate` has it."""
    numbers = list(item) if isinstance(item, tuple | list) else []
    if len(numbers) not in (2, 3) or any(type(n) is not int or n < 1 for n in numbers):
        raise _not_a_shape(item)
    batch, longest, *new = numbers
    (new,) = new or [min(SamplingParams.max_new_tokens, max(1, max_positions - longest))]
    if longest + new > max_positions:
        raise UsageError(
            "no such prompt fits into the model",
            key="warm_up",
            expected=f"at most {max_positions} tokens together",
            found=f"{longest} in the prompt + {new} new = {longest + new}",
        )
    return make_shape(batch, longest, new, max_positions, dp)


def _not_a_shape(found: object) -> UsageError:
    return UsageError(
        "nothing that could be compiled ahead",
        key="warm_up",
        expected="a list of (batch, prompt_length) or (batch, prompt_length, max_new_tokens)",
        found=repr(found),
    )


def _in_words(shape: Shape, error: BaseException) -> str:
    first_line = str(error).strip().partition("\n")[0]
    what = f"a batch of {shape.rows} prompts of up to {shape.prompt} tokens"
    return f"{what} could not be compiled ahead: {type(error).__name__}: {first_line}"
