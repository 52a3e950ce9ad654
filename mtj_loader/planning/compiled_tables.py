"""What the TPU compiler says, as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table

from mtj_loader import display
from mtj_loader.display import show_bytes
from mtj_loader.planning.compiled_fit import CompiledFit, CompiledProgram, Memory


def compiled_tables(compiled: Sequence[CompiledFit]) -> Iterator[RenderableType]:
    """A table of memory, a table of programs, and a line for each failure; nothing for nothing."""
    fitting = [fit for fit in compiled if fit.memory is not None]
    if fitting:
        yield _memory_table(fitting)
        yield _program_table(fitting)
    for fit in compiled:
        if fit.failure is not None:
            yield display.line(f"{fit.name}: {fit.failure}", "yellow")


def _memory_table(compiled: Sequence[CompiledFit]) -> Table:
    """HBM of a device to the byte, and how much more would fit."""
    headers = "compiled for", "slots x context", *Memory.__dataclass_fields__, "of", "most slots"
    table = display.table(*headers, "longest context")
    for fit in compiled:
        assert fit.memory is not None
        sizes = [f"{size:,}" for size in vars(fit.memory).values()]
        shape = f"{fit.slots} x {fit.context:,}"
        more = f"{fit.largest_slots:,}", f"{fit.largest_context:,}"
        display.add_row(table, fit.name, shape, *sizes, f"{fit.available_bytes:,}", *more)
    return table


def _program_table(compiled: Sequence[CompiledFit]) -> Table:
    """What each program does, and how long XLA estimates it to take."""
    headers = "compiled for", "program", "compiled in", "collectives", "weights copied"
    table = display.table(*headers, "least", "XLA's bytes", "XLA's cycles")
    for fit in compiled:
        for name, program in fit.programs.items():
            copied = show_bytes(sum(copy.bytes for copy in program.weight_copies))
            least = _milliseconds(fit.limit_seconds if name == "decode" else None)
            times = least, _milliseconds(program.xla_seconds)
            display.add_row(
                table,
                fit.name,
                name,
                f"{program.compile_seconds:.1f} s",
                _collectives(program),
                copied if program.weight_copies else "none",
                *times,
                _milliseconds(program.schedule_seconds),
            )
    return table


def _collectives(program: CompiledProgram) -> Sequence[str]:
    texts = [f"{one.count} {one.kind}, {show_bytes(one.bytes)}" for one in program.collectives]
    return texts or ["none"]


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.2f} ms"
