"""Runs the command line: in this process, or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner, Result

from mtj_loader.cli.app import app

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests/data/shakespeare-neox"


def run(*arguments: object) -> Result:
    """Runs `mtj-loader` in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def start(*arguments: object, script: str | None = None) -> subprocess.Popen[str]:
    """Starts a process: `mtj-loader …`, or a script that gets these arguments."""
    program = ["-m", "mtj_loader.cli"] if script is None else ["-c", script]
    return subprocess.Popen(
        [sys.executable, "-W", "error", *program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
