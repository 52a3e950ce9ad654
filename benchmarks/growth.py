"""How time and memory grow with the model: `python -m benchmarks.growth`, after benchmarks.load.

Draws what `benchmarks.load` left in the results folder, one point for each shape.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import plot


def main(
    results: Annotated[Path, typer.Argument(help="where the JSON files are")] = Path(
        "benchmarks/results"
    ),
) -> None:
    """Writes growth.png beside the results with a warm page cache."""
    found = [json.loads(file.read_text()) for file in results.glob("load-*.json")]
    warm = [result for result in found if result["page_cache"] == "warm"]
    plot.growth(warm, results / "growth.png")


if __name__ == "__main__":
    typer.run(main)
