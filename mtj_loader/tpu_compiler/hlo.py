"""Reads the text of a compiled TPU program: XLA's optimized and scheduled HLO.

The format is what `jax.stages.Compiled.as_text` prints. Only what the reports need is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%(?P<name>\S+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"\s+(?P<root>ROOT )?%(?P<name>\S+) = (?P<type>.*?) (?P<opcode>[a-z][\w-]*)\((?P<rest>.*)"
)
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*)\w*\[(?P<sizes>[\d,]*)\](?:\{(?P<layout>[^}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_MEMORY = re.compile(r"S\((\d+)\)")  # absent in HBM; 1 is on-chip vector memory
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|branch_computations|true_computation|false_computation)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_BITS = {"pred": 8}  # of dtypes whose name does not end in their bits


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result.

    Attributes:
      dtype: XLA's name, such as "bf16".
      sizes: of its axes.
      layout: XLA's text: the axes from the fastest to the slowest, tiles, and the memory space.
    """

    dtype: str
    sizes: tuple[int, ...]
    layout: str

    @property
    def elements(self) -> int:
        """Their number, without padding."""
        return math.prod(self.sizes)

    @property
    def in_hbm(self) -> bool:
        """Whether it is in HBM, not in on-chip memory."""
        return _MEMORY.search(self.layout) is None

    @property
    def bytes(self) -> int:
        """Its size in memory, with the padding of tiles."""
        order, tile = self.layout.partition(":")[0], _TILE.search(self.layout)
        axes = [self.sizes[int(axis)] for axis in order.split(",") if axis]
        tiles = [int(size) for size in tile[1].split(",")][::-1] if tile else []
        padded = [-(-n // t) * t for n, t in zip(axes, tiles, strict=False)]
        return math.prod([*padded, *axes[len(padded) :]]) * _bits(self.dtype) // 8


@dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
      name: unique in the module.
      type: the text of its result's type.
      opcode: such as "fusion".
      operands: the names of the instructions that it reads.
      text: what follows the operands' opening parenthesis.
      is_root: whether it is the computation's result.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    is_root: bool

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of its result; several for a tuple."""
        return tuple(_array(found) for found in _ARRAY.finditer(self.type))

    @property
    def is_tuple(self) -> bool:
        """Whether its result is a tuple."""
        return self.type.startswith("(")

    @cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it calls."""
        lists = (several or one for several, one in _CALLED.findall(self.text))
        return tuple(name.strip().lstrip("%") for each in lists for name in each.split(","))

    @property
    def op_name(self) -> str:
        """The JAX operation that it comes from, as a path; empty if unknown."""
        found = _OP_NAME.search(self.text)
        return found[1].replace("\\'", "'") if found else ""

    @property
    def cycles(self) -> int:
        """XLA's estimate of the clock cycles it takes; 0 if XLA states none."""
        return max(map(int, _CYCLES.findall(self.text)), default=0)

    @property
    def index(self) -> int:
        """The number of an entry parameter, or of the element that is taken from a tuple."""
        pattern = r"(\d+)\)" if self.opcode == "parameter" else r"index=(\d+)"
        found = re.search(pattern, self.text)
        assert found is not None
        return int(found[1])


@dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: the instructions of each computation, in the order in which they run.
      entry: the name of the computation that runs first.
    """

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    @property
    def parameters(self) -> list[Instruction]:
        """The arrays that a device gets."""
        return [one for one in self.computations[self.entry] if one.opcode == "parameter"]

    def executed(self) -> Iterator[tuple[Instruction, int]]:
        """Every instruction that runs by itself, and how often; not those inside of fusions.

        A loop whose number of runs depends on data counts as one run.
        """
        yield from self._executed(self.entry, 1)

    def _executed(self, computation: str, times: int) -> Iterator[tuple[Instruction, int]]:
        for one in self.computations[computation]:
            yield one, times
            if one.opcode in CONTROL_FLOW:
                for name in one.called:
                    yield from self._executed(name, times * (self.trips(one) or 1))

    def trips(self, one: Instruction) -> int | None:
        """How often a loop that counts from 0 to a constant runs; None if it depends on data.

        1 for everything else than a loop.
        """
        for name in one.called if one.opcode == "while" else ():
            body = {each.name: each for each in self.computations[name]}
            test = next(each for each in body.values() if each.is_root)
            ends = [body[operand] for operand in test.operands if operand in body]
            constants = [end.text for end in ends if end.opcode == "constant"]
            if test.opcode == "compare" and "direction=LT" in test.text and constants:
                return int(constants[0].partition(")")[0])
        return None if one.opcode == "while" else 1


CONTROL_FLOW = ("while", "conditional", "call", "async-start")


def parse(text: str) -> Module:
    """Parses the text of a compiled program."""
    computations: dict[str, tuple[Instruction, ...]] = {}
    body: list[Instruction] = []
    name = entry = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name, body = found["name"], []
            entry = name if found["entry"] else entry
        elif line == "}":
            computations[name] = tuple(body)
        elif found := _INSTRUCTION.match(line):
            body.append(_instruction(found))
    return Module(computations, entry)


def _instruction(found: re.Match[str]) -> Instruction:
    operands = re.findall(r"%([\w.\-]+)", found["rest"].partition(")")[0])
    is_root = found["root"] is not None
    return Instruction(
        found["name"], found["type"], found["opcode"], tuple(operands), found["rest"], is_root
    )


def _array(found: re.Match[str]) -> Array:
    sizes = tuple(int(size) for size in found["sizes"].split(",") if size)
    return Array(found["dtype"], sizes, found["layout"] or "")


def _bits(dtype: str) -> int:
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else _BITS[dtype]
