"""Signals and limits of real processes: one clear error, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support import neox
from tests.support.checkpoints import safetensors_bytes, safetensors_header
from tests.support.command_line import FIXTURE, run_limited, start

# Native code that does not react to signals, like a compiler, for longer than any test waits.
NATIVE = """
import hashlib, sys, types
from mtj_loader.cli import main

def load(*_, **__):
    sys.stderr.write("ready\\n")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)

api = types.SimpleNamespace(RunOptions=lambda *_, **__: None, load_source=load)
sys.modules["mtj_loader.api"] = api
main(sys.argv[1:])
"""


def begin(script: str, first: str = ":") -> subprocess.Popen[str]:
    process = start("load", FIXTURE, script=script, first=first)
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted\n"),
        (signal.SIGTERM, 143, "terminated\n"),
        (signal.SIGHUP, 129, "the terminal was closed\n"),
    ],
)
def test_signals_end_native_code_at_once(number: int, code: int, word: str):
    process = begin(NATIVE)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (code, word)


def test_under_a_limit_the_working_process_ends_with_its_parent():
    script = """
import os, time
from mtj_loader.cli.memory_limit import supervise_memory_limit
supervise_memory_limit()
print(os.getpid(), flush=True)
time.sleep(600)
"""
    process = start(script=script, first="ulimit -v 10000000")
    assert process.stdout is not None
    child = Path(f"/proc/{int(process.stdout.readline())}")
    assert int(child.name) != process.pid
    process.kill()
    process.communicate(timeout=60)
    for _ in range(1000):
        if not child.exists():
            return
        time.sleep(0.01)
    pytest.fail("it is still running")


def test_under_a_limit_an_error_before_a_crash_is_kept():
    script = """
import os, signal, sys
from mtj_loader.cli.memory_limit import supervise_memory_limit
supervise_memory_limit()
print("error: the disk is full", file=sys.stderr, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    code, stderr = run_limited("ulimit -v 10000000", script=script)
    assert (code, stderr) == (128 + signal.SIGKILL, "error: the disk is full\n")


def test_an_ignored_signal_stays_ignored():
    process = begin(NATIVE, first="trap '' INT")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    assert process.communicate(timeout=60) == ("", "terminated\n")


IMPORTING = """
import sys
from mtj_loader.cli import main

class Finder:  # the first import of the commands takes forever
    def find_spec(self, name, path=None, target=None):
        if name == "mtj_loader.cli.app":
            sys.stderr.write("ready\\n")
            while True:
                pass

sys.meta_path.insert(0, Finder())
main(sys.argv[1:])
"""


def test_ctrl_c_while_importing():
    process = begin(IMPORTING)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "interrupted\n")
    assert process.returncode == 130


SLOW = """
import os, sys, threading, time
from mtj_loader.storage.local import LocalStorage
from mtj_loader.cli import main

read = LocalStorage.read_into

def slowly(self, *arguments):
    if threading.current_thread() is not threading.main_thread():
        os.write(1, b"ready\\n")  # at once, from any thread
        time.sleep(60)
    read(self, *arguments)

LocalStorage.read_into = slowly
main(sys.argv[1:])
"""


def everything_on(terminal: int) -> str:
    """Everything that was written to a terminal whose other end is closed."""
    shown = b""
    with contextlib.suppress(OSError):  # Linux reports the end as an error
        while part := os.read(terminal, 1 << 12):
            shown += part
    os.close(terminal)
    return shown.decode()


def test_a_progress_bar_restores_the_cursor():
    terminal, stderr = pty.openpty()
    process = start("load", FIXTURE, "--mesh", "mp=1", script=SLOW, stderr=stderr)
    os.close(stderr)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    shown = everything_on(terminal)
    assert "\x1b[?25hinterrupted\r\n" in shown
    assert shown.rindex("\x1b[?25l") < shown.rindex("\x1b[?25h")


def test_help_for_a_closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    process = start("load", "--help", stdout=writer)
    os.close(writer)
    assert process.communicate(timeout=60) == (None, "")
    assert process.returncode == 128 + signal.SIGPIPE


def test_help_on_a_full_disk():
    code, stderr = run_limited("exec > /dev/full", "--help")
    assert code == 4
    assert stderr.startswith(
        "error: the operating system reported an error\n  found: [Errno 28] No space left"
    )


# Limits of real processes.


@pytest.mark.parametrize("limit", [60, 300, 600], ids="{} MiB".format)
def test_too_little_memory_to_start(limit: int):
    code, stderr = run_limited(f"ulimit -v {limit << 10}", "load", FIXTURE, "--mesh", "mp=8")
    assert code == 4
    exceeded = "error: the process exceeded the limit of its address space\n  expected: 1 to 2 GB"
    assert stderr.startswith(exceeded)
    assert f"found: {limit << 20:,} bytes (" in stderr
    assert stderr.endswith("hint: ulimit -v sets the limit\n")


LATE = """
import resource, sys
from pathlib import Path
import jax
import mtj_loader
import mtj_loader.loading.load_params

jax.devices()
plan = mtj_loader.plan(sys.argv[1], "mp=1")
mtj_loader.loading.load_params.check_memory = lambda *_: None  # memory gets short after it
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[2]) * 10**6
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    mtj_loader.load(plan=plan)
except mtj_loader.MemoryLimitError as error:
    print(error, file=sys.stderr)
"""


def test_memory_that_runs_out_while_loading(tmp_path: Path):
    """There are two parameters of 80 MB, and memory for one and a half."""
    rows = 1_666_000
    tensors = neox.tensors()
    big = np.broadcast_to(np.float32(0), (rows, 24))
    tensors |= {"gpt_neox.embed_in.weight": big, "embed_out.weight": big}
    folder = neox.write(tmp_path, vocab_size=rows)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(safetensors_bytes(safetensors_header(tensors)))
        file.truncate(file.tell() + sum(array.nbytes for array in tensors.values()))
    process = start(folder, 120, script=LATE)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0
    first, needed, found, hint = stderr.splitlines()
    assert first == "out of memory on the host"
    assert needed == "  expected: 79,968,000 contiguous bytes"
    assert found.endswith(" within the limit of the address space (ulimit -v)")
    assert hint.startswith("  hint: ")


def test_a_bug_under_a_limit_is_reported_as_a_bug(tmp_path: Path):
    script = NATIVE.replace("load_source=load", "load_source=None").partition("main(sys")[0]
    command = "main(['load', 'x'])"
    log = tmp_path / "log"  # a seekable file; the child process has a pipe
    code, _ = run_limited(f"ulimit -v 4000000; exec 2> {log}", script=script + command)
    assert code == 1
    assert log.read_text().startswith("error: unexpected TypeError: 'NoneType'")


def test_a_signal_reaches_a_process_under_a_limit():
    telling = NATIVE.replace("sys.stderr.write", "os.write(1, b'ready\\n') or len").replace(
        "import hashlib", "import os, hashlib"
    )
    process = start("load", FIXTURE, script=telling, first="ulimit -v 10000000")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.communicate(timeout=60) == ("", "terminated\n")
    assert process.returncode == 143


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("ulimit -n 6", "error: cannot "),
        # Every thread requests a stack of 100 TB.
        (
            "ulimit -s 100000000000",
            "error: the system refuses a pipe or a thread\n",
        ),
    ],
    ids=["files", "threads"],
)
def test_too_few_files_and_threads(limit: str, words: str):
    code, stderr = run_limited(limit, "load", FIXTURE, "--mesh", "mp=8")
    assert code == 4
    assert stderr.startswith(words)
