"""Plots time and memory by model size: `python -m benchmarks.scaling`, after benchmarks.load.

The plot has one point per shape for which `benchmarks.load` has left results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import plot


def main(
    results: Annotated[Path, typer.Argument(help="folder with the JSON files")] = Path(
        "benchmarks/results"
    ),
) -> None:
    """Writes scaling.png; a shape that was measured warm and cold appears as warm."""
    found = [json.loads(file.read_text()) for file in results.glob("load-*.json")]
    found.sort(key=lambda result: result["page_cache"] == "warm")  # warm replaces cold
    by_shape = {result["shape"]: result for result in found}
    plot.scaling([*by_shape.values()], results / "scaling.png")


if __name__ == "__main__":
    typer.run(main)
