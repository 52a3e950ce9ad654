"""README and notebook show what their code prints, except for text that rounding may change."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
NOTEBOOK = json.loads((ROOT / "notebooks/quickstart.ipynb").read_text())
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_SLOW_DTYPE = "ignore:generating with bfloat16 parameters"  # on CPUs without its arithmetic
PYTHON_FILES = [
    path
    for folder in ("mtj_loader", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
]


def run(*arguments: str, folder: Path = ROOT) -> str:
    """Runs Python in a folder; returns what it prints."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-W", _SLOW_DTYPE, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout


def stable(text: str) -> list[str]:
    """The lines that are not empty and contain no times."""
    return [line.rstrip() for line in text.splitlines() if line.strip() and " read in " not in line]


def test_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_python_example_prints_what_the_readme_shows():
    code, shown = re.findall(r"```(?:python)?\n(import jax.*?)```\n+```\n(.*?)```", README, re.S)[0]
    arrays, text = run("-c", code).split("\n\n", 1)
    assert stable(arrays) == stable(shown.split("\n\n", 1)[0]) == ["(8, 192, 72)"]
    assert text.strip()


def test_command_examples_print_what_the_readme_shows():
    load, plan = re.findall(r"```\n\$ mtj-loader ([^\n]*)\n(.*?)```", README, re.S)
    command = load[0].split()
    assert stable(run("-m", "mtj_loader.cli", *command)) == stable(load[1])[1:]  # first: stderr
    command = plan[0].removesuffix(" | head -12").split()
    found = run("-m", "mtj_loader.cli", *command).replace(str(ROOT), "…")
    assert found.splitlines()[:12] == plan[1].splitlines()


def test_notebook_shows_what_its_cells_print():
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    printed = run("-c", "\nprint('@@')\n".join(map(_print_value, cells)), folder=ROOT / "notebooks")
    for cell, found in zip(cells, printed.split("@@\n"), strict=True):
        if re.search(r"model\.(stream|generate)\(", "".join(cell["source"])):
            assert found.strip()
        else:
            texts = [o.get("text") or o["data"]["text/plain"] for o in cell["outputs"]]
            assert stable(found) == stable("".join(map("".join, texts)))


def _print_value(cell: dict) -> str:
    """The cell's source, with a print of its last line if the notebook shows that value."""
    *before, last = "".join(cell["source"]).split("\n")
    if any(output["output_type"] == "execute_result" for output in cell["outputs"]):
        last = f"print(repr({last}))"
    return "\n".join([*before, last])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_to_files(page: Path):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_files_that_are_named_exist(page: Path):
    """A page may omit folders that its context makes clear; modeling_*.py is transformers' own."""
    for name in re.findall(r"`(?!modeling_)([\w/]+\.py)`", page.read_text()):
        assert any(path.match(name) for path in PYTHON_FILES), name
