"""How long a compiled TPU program takes by XLA's own estimates.

XLA states clock cycles for each operation, and a schedule. Reads of HBM run beside them: this
module adds both up along the schedule. Collectives have no estimate and count as nothing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field, replace

from mtj_loader.planning.compiled_fit import OperationCost
from mtj_loader.tpu_compiler.hlo import Instruction, Module

_LAYER = re.compile(r"layer_\d+")
_ASYNC = ("copy-start", "slice-start")
_DONE = ("copy-done", "slice-done")
_READERS = ("copy", "custom-call", "convolution", "dot", "fusion", "transpose", "convert")


@dataclass(frozen=True)
class Schedule:
    """A program's estimated time.

    Attributes:
      seconds: of the whole program.
      hbm_bytes: that it reads and writes.
      operations: the costs, largest first.
    """

    seconds: float
    hbm_bytes: int
    operations: tuple[OperationCost, ...]


@dataclass
class _Clock:
    """The state while the schedule is followed; times in seconds.

    Attributes:
      hertz: clock rate.
      trips: how often loops run whose number of runs depends on data.
      bandwidth: of HBM, bytes per second.
      now: when the current operation starts.
      memory: when HBM has done all reads that were asked for.
      ends: when each asynchronous copy is done.
      costs: so far, by operation.
    """

    hertz: float
    trips: int
    bandwidth: float
    now: float = 0.0
    memory: float = 0.0
    ends: dict[str, float] = field(default_factory=dict)
    costs: dict[str, OperationCost] = field(default_factory=lambda: defaultdict(_no_cost))

    def add(self, name: str, seconds: float, hbm_bytes: int) -> None:
        """Adds an operation, which starts now, to its kind's costs."""
        cost = self.costs[name]
        self.costs[name] = replace(
            cost,
            name=name,
            count=cost.count + 1,
            seconds=cost.seconds + seconds,
            hbm_bytes=cost.hbm_bytes + hbm_bytes,
        )
        self.now += seconds

    def read(self, hbm_bytes: int) -> float:
        """Asks for a read or write of HBM; returns when it is done."""
        self.memory = max(self.memory, self.now) + hbm_bytes / self.bandwidth
        return self.memory


def estimate(module: Module, *, hertz: float, bandwidth: float, trips: int = 1) -> Schedule:
    """Follows the schedule of a program.

    Args:
      module: the program.
      hertz: the clock rate of a core.
      bandwidth: of a device's HBM, in bytes per second.
      trips: how often loops run whose number of runs depends on data.
    """
    clock = _Clock(hertz, trips, bandwidth)
    _run(module, module.entry, clock)
    costs = sorted(clock.costs.values(), key=lambda cost: -cost.seconds)
    return Schedule(clock.now, sum(cost.hbm_bytes for cost in costs), tuple(costs))


def _run(module: Module, computation: str, clock: _Clock) -> None:
    known = {one.name: one for one in module.computations[computation]}
    for one in module.computations[computation]:
        name = _LAYER.sub("layer", one.op_name) or one.opcode
        if one.opcode in _ASYNC:
            read = _copied_bytes(one, known)
            clock.ends[one.name] = clock.read(read)
            clock.add(name, 0.0, read)
        elif one.opcode in _DONE:
            wait = clock.ends.get(one.operands[0], 0.0) - clock.now
            clock.add("wait", max(0.0, wait), 0)
        elif one.opcode == "while":
            for _ in range(module.trips(one) or clock.trips):
                for called in one.called:
                    _run(module, called, clock)
        elif one.opcode in ("conditional", "call"):
            for called in one.called:  # all branches: an upper bound
                _run(module, called, clock)
        else:
            moved = _hbm_bytes(module, one, known)
            clock.read(moved)  # asynchronous copies have to share HBM with it
            seconds = max(one.cycles / clock.hertz, moved / clock.bandwidth)
            clock.add(name, seconds, moved)


def _copied_bytes(one: Instruction, known: dict[str, Instruction]) -> int:
    """Bytes that an asynchronous copy moves from or to HBM."""
    source = known[one.operands[0]].arrays
    ends = (*source[:1], *one.arrays[:1])
    return one.arrays[0].bytes if any(end.in_hbm for end in ends) else 0


def _hbm_bytes(module: Module, one: Instruction, known: dict[str, Instruction]) -> int:
    """Bytes of HBM that an operation reads and writes itself."""
    if one.opcode not in _READERS:
        return 0
    (body,) = [module.computations[name] for name in one.called[:1]] or [()]
    total = 0 if _updates_in_place(body) else _bytes_in_hbm(one)
    for i, name in enumerate(one.operands):
        operand = known[name]
        if not operand.is_tuple and operand.arrays[0].in_hbm:
            whole, part = _bytes_in_hbm(operand), _part_of_parameter(module, body, i)
            total += whole if part is None else min(whole, part)
    return total


def _bytes_in_hbm(one: Instruction) -> int:
    return sum(array.bytes for array in one.arrays if array.in_hbm)


def _part_of_parameter(module: Module, body: tuple[Instruction, ...], index: int) -> int | None:
    """The bytes that a fused computation reads of a parameter; None if it reads everything."""
    names = {one.name for one in body if one.opcode == "parameter" and one.index == index}
    total = 0
    for one in body:
        if names.isdisjoint(one.operands):
            continue
        if one.opcode == "bitcast":
            names.add(one.name)
        elif one.opcode in ("dynamic-slice", "gather"):
            total += one.arrays[0].bytes
        elif one.opcode == "fusion":
            inner = module.computations[one.called[0]]
            parts = [
                _part_of_parameter(module, inner, i)
                for i, operand in enumerate(one.operands)
                if operand in names
            ]
            if None in parts:
                return None
            total += sum(part or 0 for part in parts)
        elif one.opcode != "dynamic-update-slice" or one.operands[0] not in names:
            return None
    is_result = any(one.is_root and one.name in names for one in body)
    return None if is_result or not names else total


def _updates_in_place(body: tuple[Instruction, ...]) -> bool:
    """Whether a fused computation writes a part of an array only."""
    return any(one.is_root and one.opcode == "dynamic-update-slice" for one in body)


def _no_cost() -> OperationCost:
    return OperationCost("")
