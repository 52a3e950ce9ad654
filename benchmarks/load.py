"""Load time of mtj_loader, the floor and other loaders: `python -m benchmarks.load`."""

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
from benchmarks.interleaved import medians, run_interleaved, select

CACHE = Path(tempfile.gettempdir()) / "mtj_loader_benchmarks"
RESULTS = Path("benchmarks/results")
_MAPPED = 0.5  # a loader that reads less than this share of the bytes maps the files


def main(
    *,
    shape: Annotated[str, typer.Option(help=f"one of {', '.join(SHAPES)}")] = "pythia-1.4b",
    runs: Annotated[int, typer.Option(help="timed runs of each loader")] = 5,
    only: Annotated[str, typer.Option(help='names or prefixes, for example "ours,floor"')] = "",
    cold: Annotated[bool, typer.Option(help="drop the files from the page cache first")] = False,
    cache: Annotated[Path, typer.Option(help="where synthetic checkpoints are kept")] = CACHE,
    out: Annotated[Path, typer.Option(help="folder for JSON and plot")] = RESULTS,
) -> None:
    """Measures the loaders in turn; prints a table, writes JSON and a plot."""
    console = Console()
    folder = checkpoint(shape, cache)
    names = select([part.strip() for part in only.split(",") if part.strip()])
    found = run_interleaved(
        names, folder, runs, cold=cold, log=lambda line: console.print(f"  {line}")
    )
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
    """The medians as a table."""
    grid = Table(title=f"{result['shape']}, {result['bytes'] / 1e9:.2f} GB, {result['page_cache']}")
    grid.caption = machine.describe(result["machine"])
    grid.add_column("medians")
    for column in _COLUMNS:
        grid.add_column(column, justify="right")
    for name, values in result["medians"].items():
        read = values["bytes_read"] / result["bytes"]
        grid.add_row(
            name,
            f"{values['seconds']:.2f}",
            f"{values['ratio']:.2f}" if "ratio" in values else "",
            f"{values['fastest_seconds']:.2f}",
            f"{values['processor_seconds']:.2f}",
            f"{values['extra_bytes'] / 1e6:,.0f} MB",
            f"{read:.3f}" if read > _MAPPED else "mapped",
        )
    return grid


_COLUMNS = ("seconds", "÷ floor", "fastest", "CPU", "memory over parameters", "read ÷ needed")


if __name__ == "__main__":
    typer.run(main)
