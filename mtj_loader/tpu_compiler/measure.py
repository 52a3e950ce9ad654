"""Compiles a model's programs with libtpu, for devices that need not exist, and measures them."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered

from mtj_loader.models import usable_shards
from mtj_loader.models.config import ModelConfig
from mtj_loader.models.forward import Forward, Tree
from mtj_loader.models.layers.attend import TPU_BLOCK
from mtj_loader.parameters import round_up
from mtj_loader.planning.compiled_fit import CompiledFit, CompiledProgram, Memory
from mtj_loader.planning.tpu_targets import Target
from mtj_loader.tpu_compiler.findings import collectives, is_weight, weight_copies
from mtj_loader.tpu_compiler.hlo import parse
from mtj_loader.tpu_compiler.serving_programs import serving_programs
from mtj_loader.tpu_compiler.slice_mesh import slice_mesh
from mtj_loader.tpu_compiler.time_estimate import estimate

CONTEXT_STEP = 128  # contexts are searched in steps of a TPU's lanes
MAX_SLOTS = 1024  # more are not searched for
_TRIES = 4  # of a search; memory is all but linear in what is searched
_MAX_OPERATIONS = 12  # that a report lists

# XLA's message for a program that needs too much HBM.
_REFUSED = re.compile(
    r"total memory required for \w+ \w+ \((?P<needed>[\d.]+)(?P<needed_unit>[KMGT])\) "
    r"exceeds available HBM \((?P<available>[\d.]+)(?P<available_unit>[KMGT])\)"
)
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Subject:
    """What is compiled.

    Attributes:
      config: the model.
      target: the slice.
      transposed_linear: whether linear weights are [out, in].
      dtype: of the parameters and the cache.
    """

    config: ModelConfig
    target: Target
    transposed_linear: bool
    dtype: np.dtype

    @cached_property
    def mesh(self) -> Mesh:
        """The devices of the slice, with as many shards as the model allows."""
        devices = self.target.slice.devices
        shards = usable_shards(self.config, devices)[-1]
        return slice_mesh(self.target, devices // shards, shards)

    def compile(self, slots: int, context: int) -> dict[str, CompiledProgram]:
        """Compiles all programs.

        Raises:
          OutOfHbm: they need more memory than there is.
          JaxRuntimeError: XLA cannot compile one of them for another reason.
        """
        programs = serving_programs(self.forward, self._params, slots, context)
        blocks = -(-context // TPU_BLOCK)  # that attention reads of a full context
        return {name: self._compile(lower(), blocks) for name, lower in programs.items()}

    @cached_property
    def forward(self) -> Forward:
        """The model on the slice."""
        return Forward(self.config, self.mesh, self.transposed_linear, self.dtype)

    @cached_property
    def _params(self) -> Tree:
        return self.forward.param_shapes()

    @cached_property
    def _compiled(self) -> dict[str, CompiledProgram]:
        """The programs so far, by their text: one may not depend on the slots or the context."""
        return {}

    def _compile(self, lowered: Lowered, trips: int) -> CompiledProgram:
        text = lowered.as_text()
        if text not in self._compiled:
            self._compiled[text] = compile_program(lowered, self.target, trips)
        return self._compiled[text]


class OutOfHbm(Exception):
    """A program needs more HBM than XLA lets it use.

    Attributes:
      shortfall_bytes: how much more; XLA states it in hundredths of a GiB.
    """

    def __init__(self, shortfall_bytes: int) -> None:
        self.shortfall_bytes = shortfall_bytes
        super().__init__(f"{shortfall_bytes:,} bytes of HBM are missing")


def compile_program(lowered: Lowered, target: Target, trips: int) -> CompiledProgram:
    """Compiles a program and reads what it needs and does.

    Args:
      lowered: the program.
      target: the devices.
      trips: how often loops are taken to run whose number of runs depends on data.

    Raises:
      OutOfHbm: it needs more memory than there is.
      JaxRuntimeError: XLA cannot compile it for another reason.
    """
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (shortfall := shortfall_bytes(str(error))) is None:
            raise
        raise OutOfHbm(shortfall) from error
    seconds = time.perf_counter() - start
    stats, costs, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    assert stats is not None
    assert costs is not None
    assert text is not None
    xla_seconds, module = costs.get("optimal_seconds", 0.0), parse(text)
    schedule = estimate(module, hertz=target.hertz, bandwidth=target.bandwidth, trips=trips)
    weights = [parameter for parameter in module.parameters if is_weight(parameter)]
    return CompiledProgram(
        compile_seconds=seconds,
        parameter_bytes=sum(parameter.arrays[0].bytes for parameter in weights),
        argument_bytes=stats.argument_size_in_bytes,
        temporary_bytes=stats.temp_size_in_bytes,
        program_bytes=stats.generated_code_size_in_bytes,
        collectives=tuple(collectives(module)),
        weight_copies=tuple(weight_copies(module)),
        xla_seconds=xla_seconds if xla_seconds > 0 else None,  # it is negative if XLA cannot tell
        schedule_seconds=schedule.seconds,
        hbm_bytes=schedule.hbm_bytes,
        operations=schedule.operations[:_MAX_OPERATIONS],
    )


def shortfall_bytes(message: str) -> int | None:
    """The HBM that is missing according to XLA's message; None for messages about other things."""
    found = _REFUSED.search(message)
    if found is None:
        return None
    needed, available = (
        float(found[name]) * _UNITS[found[f"{name}_unit"]] for name in ("needed", "available")
    )
    return int(needed - available)


def memory_of(programs: dict[str, CompiledProgram]) -> Memory:
    """The memory that the programs need together; one of them runs at a time."""
    parameters = max(program.parameter_bytes for program in programs.values())
    return Memory(
        parameters=parameters,
        cache=programs["decode"].argument_bytes - programs["decode"].parameter_bytes,
        temporaries=max(program.temporary_bytes for program in programs.values()),
        programs=sum(program.program_bytes for program in programs.values()),
    )


def measure(subject: Subject, slots: int, context: int, *, search: bool) -> CompiledFit:
    """Compiles a model for a slice and says what the compiler says.

    Args:
      subject: the model and the slice.
      slots: sequences at a time; rounded up to a multiple of dp.
      context: tokens that each slot has room for.
      search: also find the longest context and the most slots that fit.
    """
    dp, mp = subject.mesh.devices.shape
    slots = round_up(slots, dp)
    available = subject.target.available_bytes
    fit = CompiledFit(subject.target.slice.name, dp, mp, slots, context, available)
    try:
        programs = subject.compile(slots, context)
    except OutOfHbm as error:
        return replace(fit, shortfall_bytes=error.shortfall_bytes)
    fit = replace(
        fit,
        memory=memory_of(programs),
        programs=programs,
        limit_seconds=programs["decode"].argument_bytes / subject.target.bandwidth,
    )
    return replace(fit, **_largest(subject, fit)) if search else fit


def _largest(subject: Subject, fit: CompiledFit) -> dict[str, int]:
    """The longest context with these slots, and the most slots with this context, that fit."""
    assert fit.memory is not None
    free = fit.available_bytes - fit.memory.total
    per_token = fit.memory.cache / fit.context  # of all slots
    per_slot = fit.memory.cache / fit.slots
    longest = subject.config.max_positions
    return {
        "largest_context": search_largest(
            lambda context: free_bytes(subject, fit.slots, context),
            Line(fit.context, free, per_token),
            CONTEXT_STEP,
            longest,
        ),
        "largest_slots": search_largest(
            lambda slots: free_bytes(subject, slots, fit.context),
            Line(fit.slots, free, per_slot),
            fit.dp,
            round_up(MAX_SLOTS, fit.dp),
        ),
    }


def free_bytes(subject: Subject, slots: int, context: int) -> int:
    """HBM that serving leaves on a device; negative if it does not fit."""
    try:
        total = memory_of(subject.compile(slots, context)).total
    except OutOfHbm as error:
        return -error.shortfall_bytes
    return subject.target.available_bytes - total


@dataclass(frozen=True)
class Line:
    """Free memory as a function of one number: `free` at `start`, and `cost` less for each more."""

    start: int
    free: int
    cost: float


def search_largest(measured: Callable[[int], int], line: Line, step: int, limit: int) -> int:
    """The largest number, up to `limit`, that leaves no negative memory, in a few measurements.

    Args:
      measured: the bytes that a number leaves; decreases a bit more than the line, because
        temporaries grow too.
      line: a number that fits, and how fast memory decreases.
      step: between the numbers that are tried.
      limit: the largest one of interest.
    """
    best = at = line.start
    free = line.free
    for _ in range(_TRIES):
        steps = math.floor(free / (line.cost * step))
        at = max(best, min(limit, at + steps * step))
        if at == best:
            break
        free = measured(at)
        best = at if free >= 0 else best
    return best
