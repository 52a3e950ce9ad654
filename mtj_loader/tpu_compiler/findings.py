"""What a compiled TPU program does besides computing: collectives, and copies of weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mtj_loader.parameters import ROOT
from mtj_loader.planning.compiled_fit import Collectives, WeightCopy
from mtj_loader.tpu_compiler.hlo import CONTROL_FLOW, Instruction, Module

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_SMALLEST_COPY_BYTES = 1 << 20  # norms and biases are smaller, linear weights larger

# They move elements without computing anything.
_MOVES = {
    "bitcast",
    "broadcast",
    "concatenate",
    "constant",
    "convert",
    "copy",
    "copy-done",
    "dynamic-slice",
    "dynamic-update-slice",
    "get-tuple-element",
    "iota",
    "pad",
    "parameter",
    "reshape",
    "slice",
    "transpose",
    "tuple",
}
# Their result is the operand itself, or the operand in another memory.
_SAME = {"bitcast", "copy-done", "copy-start", "opt-barrier", "optimization-barrier"}

# Which elements of a result are weights: True or False for an array, a tuple for a tuple.
_Weight = bool | tuple["_Weight", ...]


def collectives(module: Module) -> list[Collectives]:
    """All collectives, by kind."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for one, times in module.executed():
        kind = one.opcode.removesuffix("-start")
        if kind in _COLLECTIVES:
            result = one.arrays[-1:] if one.opcode.endswith("-start") else one.arrays
            counts[kind] += times
            sizes[kind] += times * sum(array.bytes for array in result)
    return [Collectives(kind, counts[kind], sizes[kind]) for kind in sorted(counts)]


def is_weight(parameter: Instruction) -> bool:
    """Whether a parameter of the program is one of the model."""
    return ROOT.strip("/~") in parameter.op_name


def weight_copies(module: Module) -> list[WeightCopy]:
    """Weights that the program writes to HBM again; copies to on-chip memory are not meant.

    A weight is followed through tuples, loops and branches.
    """
    found: dict[str, WeightCopy] = {}
    entry = [is_weight(parameter) for parameter in module.parameters]
    order = [parameter.index for parameter in module.parameters]
    by_index = dict(zip(order, entry, strict=True))
    _follow(module, module.entry, [by_index[i] for i in sorted(order)], found)
    return list(found.values())


def _follow(
    module: Module, name: str, arguments: Sequence[_Weight], found: dict[str, WeightCopy]
) -> _Weight:
    """Follows weights through a computation; returns which elements of its result are weights."""
    values: dict[str, _Weight] = {}
    result: _Weight = False
    for one in module.computations[name]:
        operands = [values.get(operand, False) for operand in one.operands]
        values[one.name] = value = _value(module, one, operands, arguments, found)
        if any(operand is True for operand in operands) and _is_copy(module, one):
            written = sum(array.bytes for array in one.arrays if array.in_hbm)
            found[one.name] = WeightCopy(one.op_name, written)
        result = value if one.is_root else result
    return result


def _value(
    module: Module,
    one: Instruction,
    operands: list[_Weight],
    arguments: Sequence[_Weight],
    found: dict[str, WeightCopy],
) -> _Weight:
    """Which elements of an instruction's result are weights."""
    if one.opcode == "parameter":
        return arguments[one.index]
    if one.opcode == "tuple":
        return tuple(operands)
    if one.opcode == "get-tuple-element":
        whole = operands[0]
        return whole[one.index] if isinstance(whole, tuple) else whole
    if one.opcode in CONTROL_FLOW:
        branches = one.opcode == "conditional"  # the first operand says which one runs
        results = [
            _follow(module, name, operands[i + 1 : i + 2] if branches else operands, found)
            for i, name in enumerate(one.called)
        ]
        return operands[0] if one.opcode == "while" else results[0]
    return one.opcode in _SAME and operands[0]


def _is_copy(module: Module, one: Instruction) -> bool:
    """Whether an instruction writes a large array to HBM that it has not computed."""
    if one.is_tuple or not any(a.in_hbm and a.bytes >= _SMALLEST_COPY_BYTES for a in one.arrays):
        return False
    if one.opcode == "fusion":
        return all(_only_moves(module, name) for name in one.called)
    return one.opcode in _MOVES - _SAME - {"get-tuple-element", "parameter", "tuple"}


def _only_moves(module: Module, name: str) -> bool:
    """Whether a fused computation moves elements and computes none, apart from scalars."""
    return all(
        all(_only_moves(module, called) for called in one.called)
        if one.opcode == "fusion"
        else one.opcode in _MOVES or max(array.elements for array in one.arrays) == 1
        for one in module.computations[name]
    )
