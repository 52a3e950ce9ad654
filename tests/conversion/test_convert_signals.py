"""Signals sent to a conversion that runs in a subprocess."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mtj_loader
from mtj_loader.errors import UsageError
from tests.conversion.test_convert import leftovers, refusal, snapshot, write

ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "tiny")


SLOW = """
import os, sys, time
from mtj_loader.cli import main
import mtj_loader.{module} as module
before = module.{function}
def slow(*arguments, **options):
    os.write(1, b"ready\\n")  # unbuffered, from any thread
    time.sleep(0.5)
    return before(*arguments, **options)
module.{function} = slow
main(sys.argv[1:])
"""
MOMENTS = {
    "copying": ("conversion.convert_checkpoint", "_copy_file"),
    "headers": ("conversion.convert_checkpoint", "_write_other_files"),
    "tensors": ("conversion.convert_tensors", "write_at"),
    "checking": ("conversion.convert_checkpoint", "check_unchanged"),
    "syncing": ("storage.create_folder", "_sync_folder"),
}


def start(source: Path, moment: str, *arguments: str) -> subprocess.Popen[str]:
    module, function = MOMENTS[moment]
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SLOW.format(module=module, function=function),
         "convert", str(source), "--dtype", "float16", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_signals_leave_no_files(source, moment, number, code):
    (source / "README.md").write_text("text")
    process = start(source, moment)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert stderr == ("interrupted\n" if code == 130 else "terminated\n")
    assert leftovers(source.parent) == ["tiny"]


def test_many_ctrl_c_leave_no_files(source):
    process = start(source, "tensors")
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    process.communicate(timeout=30)
    assert process.returncode in (130, -signal.SIGINT)  # the last one arrived during the exit
    assert leftovers(source.parent) == ["tiny"]


def test_ctrl_c_keeps_the_target_that_would_be_overwritten(source):
    out = Path(mtj_loader.convert(source, dtype="float16").out)
    before = snapshot(out)
    process = start(source, "syncing", "--overwrite")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert snapshot(out) == before
    assert leftovers(source.parent) == ["tiny", "tiny-float16"]


def test_killed_process_leaves_a_folder_that_the_next_conversion_names(source):
    process = start(source, "syncing")
    message = refusal(UsageError, source, dtype="float16")  # while the process runs
    out = source.with_name("tiny-float16")
    assert message == f"another process is writing this output\n  file: {out}\n"
    process.kill()
    process.communicate(timeout=30)
    (name,) = (name for name in leftovers(source.parent) if name != "tiny")
    assert name.startswith(".tiny-float16.")
    assert name.endswith(".partial")
    report = mtj_loader.convert(source, dtype="float16")
    path = source.with_name(name)
    assert report.warnings == (f"left by a conversion that was killed; delete it: {path}",)
