"""Load time against the floor and the peers: `python -m benchmarks.load --shape pythia-1.4b`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import machine, plot
from benchmarks.checkpoint import SHAPES, checkpoint
from benchmarks.runs import by_turns, chosen, medians

CACHE = Path(tempfile.gettempdir()) / "mtj_loader_benchmarks"
RESULTS = Path("benchmarks/results")
_MAPPED = 0.5  # who reads less than this part of the bytes by calls has the files mapped


def main(
    *,
    shape: Annotated[str, typer.Option(help=f"one of {', '.join(SHAPES)}")] = "pythia-1.4b",
    runs: Annotated[int, typer.Option(help="timed runs of each contender")] = 5,
    only: Annotated[str, typer.Option(help='names or their beginnings, like "ours,floor"')] = "",
    cold: Annotated[bool, typer.Option(help="drop the files from the page cache first")] = False,
    cache: Annotated[Path, typer.Option(help="where synthetic checkpoints are kept")] = CACHE,
    out: Annotated[Path, typer.Option(help="folder for JSON and plot")] = RESULTS,
) -> None:
    """Measures every contender by turns; prints a table, writes JSON and a plot."""
    console = Console()
    folder = checkpoint(shape, cache)
    names = chosen([part.strip() for part in only.split(",") if part.strip()])
    found = by_turns(names, folder, runs, cold=cold, tell=lambda line: console.print(f"  {line}"))
    result = {
        "shape": shape,
        "page_cache": "cold" if cold else "warm",
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "machine": machine.facts(),
        "medians": medians(found),
        "runs": found,
    }
    console.print(table(result))
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"load-{shape}{'-cold' if cold else ''}.json"
    file.write_text(json.dumps(result, indent=1))
    plot.bars(result, file.with_suffix(".png"))


def table(result: dict) -> Table:
    """The medians for people."""
    made = Table(title=f"{result['shape']}, {result['bytes'] / 1e9:.2f} GB, {result['page_cache']}")
    made.caption = machine.in_words(result["machine"])
    made.add_column("medians")
    for column in _COLUMNS:
        made.add_column(column, justify="right")
    for name, values in result["medians"].items():
        read = values["bytes_read"] / result["bytes"]
        made.add_row(
            name,
            f"{values['seconds']:.2f}",
            f"{values['ratio']:.2f}" if "ratio" in values else "",
            f"{values['fastest_seconds']:.2f}",
            f"{values['processor_seconds']:.2f}",
            f"{values['extra_bytes'] / 1e6:,.0f} MB",
            f"{read:.3f}" if read > _MAPPED else "mapped",
        )
    return made


_COLUMNS = ("seconds", "÷ floor", "fastest", "CPU", "memory over parameters", "read ÷ needed")


if __name__ == "__main__":
    typer.run(main)
