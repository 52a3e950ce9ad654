"""Injects every fault and prints the outcomes: `python -m benchmarks.faults [--only local]`."""

from __future__ import annotations

import importlib
import json
import pkgutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import faults, machine
from benchmarks.faults.fault import Fault, Outcome
from benchmarks.load import RESULTS

Row = tuple[str, Fault, Outcome]


def main(
    *,
    only: Annotated[str, typer.Option(help="a group: local, objects or hosts")] = "",
    named: Annotated[str, typer.Option(help="part of a fault's name")] = "",
    out: Annotated[Path, typer.Option(help="folder for the JSON file")] = RESULTS,
) -> None:
    """Runs the faults one after another; prints a table and writes JSON."""
    console = Console()
    rows: list[Row] = []
    for group, fault in select(only, named):
        with tempfile.TemporaryDirectory() as scratch:
            rows.append((group, fault, fault.run(Path(scratch))))
        console.print(f"  {group}, {fault.phase}: {fault.name}: {rows[-1][2].seconds:.2f} s")
    facts = machine.facts()
    console.print(table(rows, machine.describe(facts)))
    out.mkdir(parents=True, exist_ok=True)
    name = "-".join(part for part in ("faults", only, named.replace(" ", "-")) if part)
    document = {"machine": facts, "faults": [to_dict(*row) for row in rows]}
    (out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


def select(only: str, named: str) -> Iterator[tuple[str, Fault]]:
    """The faults in the `FAULTS` of every module in this package."""
    for found in pkgutil.iter_modules(faults.__path__):
        if found.name != "__main__" and only in ("", found.name):
            module = importlib.import_module(f"benchmarks.faults.{found.name}")
            for fault in getattr(module, "FAULTS", ()):
                if named in fault.name:
                    yield found.name, fault


def to_dict(group: str, fault: Fault, outcome: Outcome) -> dict[str, object]:
    """One row as JSON types."""
    return {"group": group, "fault": fault.name, "phase": fault.phase} | asdict(outcome)


def table(rows: list[Row], caption: str) -> Table:
    """All faults as a table."""
    grid = Table("fault", "phase", "what the user sees", "exit", "seconds", "left over")
    grid.caption = caption
    for _, fault, outcome in rows:
        codes = ", ".join(map(str, outcome.exit_codes))
        left = ", ".join(outcome.left_over) or "nothing"
        grid.add_row(
            fault.name, fault.phase, outcome.message, codes, f"{outcome.seconds:.2f}", left
        )
    return grid


if __name__ == "__main__":
    typer.run(main)
