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

_started: list[subprocess.Popen[str]] = []  # by the running test


def run(*arguments: object) -> Result:
    """Runs `mtj-loader` in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def start(
    *arguments: object, script: str | None = None, first: str = ":", **files: int
) -> subprocess.Popen[str]:
    """Starts a process: `mtj-loader …`, or a script that gets these arguments.

    Args:
      arguments: of the command or the script.
      script: Python code; None runs the command.
      first: shell code to run before, which sets limits or ignores signals.
      files: stdout and stderr if they are not pipes.
    """
    program = ["-m", "mtj_loader.cli"] if script is None else ["-c", script]
    python = [sys.executable, "-W", "error", *program, *map(str, arguments)]
    process = subprocess.Popen(
        ["sh", "-c", f'{first}; exec "$@"', "sh", *python],
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | files),
    )
    _started.append(process)
    return process


def run_limited(limit: str, *arguments: object, script: str | None = None) -> tuple[int, str]:
    """The exit code and stderr of a process with a limit, such as `ulimit -n 6`."""
    process = start(*arguments, script=script, first=limit)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


def kill_started() -> None:
    """Ends the processes that a failed test has left behind."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            process.kill()
        process.communicate()
