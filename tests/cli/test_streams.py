"""Output that cannot be written: a full disk, a closed stdout or stderr, a reader that is gone."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.command_line import FIXTURE, ROOT


def shell(redirection: str, *arguments: object) -> tuple[int, str]:
    """Runs `mtj-loader` with redirected streams: its exit code, and stderr."""
    command = f'"$@" {redirection}'
    program = [sys.executable, "-m", "mtj_loader.cli", *map(str, arguments)]
    done = subprocess.run(
        ["sh", "-c", command, "sh", *program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_full_disk():
    code, stderr = shell("> /dev/full", "inspect", FIXTURE)
    assert code == 4
    assert stderr == (
        "error: cannot write the output\n  file: stdout\n  found: No space left on device\n"
    )


def test_a_closed_stdout():
    code, stderr = shell(">&-", "inspect", FIXTURE)
    assert code == 4
    assert stderr.startswith("error: stdout is closed\n  hint: redirect it")


def test_a_closed_stderr():
    """Nothing that belongs there appears on stdout, and no file gets its number."""
    assert shell("2>&-", "inspect", "/no/such/checkpoint") == (2, "")
    code, stdout = shell("2>&-", "inspect", FIXTURE)
    assert code == 0
    assert stdout.startswith("checkpoint  ")
    assert shell("2> /dev/full", "inspect", "/no/such/checkpoint") == (2, "")
