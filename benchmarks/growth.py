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
    """Writes growth.png beside the results; of a shape measured warm and cold, the warm one."""
    found = [json.loads(file.read_text()) for file in results.glob("load-*.json")]
    found.sort(key=lambda result: result["page_cache"] == "warm")  # cold ones first
    plot.growth([*{result["shape"]: result for result in found}.values()], results / "growth.png")


if __name__ == "__main__":
    typer.run(main)
