"""Signals, and a lack of memory, threads or files: one clear error, and nothing is left behind."""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import mtj_loader
from mtj_loader.cli.app import app
from mtj_loader.errors import MachineError, MemoryLimitError, StorageError
from mtj_loader.loading import buffers, load_params
from mtj_loader.loading.stream import Streamer
from mtj_loader.planning.load_plan import LoadPlan
from tests.support import neox
from tests.support.checkpoints import safetensors_bytes, safetensors_header

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests/data/shakespeare-neox"


STARTED: list[subprocess.Popen[bytes]] = []  # by the running test


def start(
    *arguments: object, script: str | None = None, first: str = ":", **files: int
) -> subprocess.Popen[bytes]:
    """Starts `mtj-loader …`, or a Python script with these arguments, in a new process.

    Args:
      arguments: of the command or the script.
      script: Python code; None runs the command.
      first: shell code to run before, which sets limits or ignores signals.
      files: stdout and stderr if they are not pipes.
    """
    program = ["-m", "mtj_loader.cli"] if script is None else ["-c", script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        ["sh", "-c", f'{first}; exec "$@"', "sh", sys.executable, *program, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        **(pipes | files),
    )
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """Kills what a failed test has left behind."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


def limited(limit: str, *arguments: object, script: str | None = None) -> tuple[int, str]:
    """The exit code and stderr of a process with a limit."""
    process = start(*arguments, script=script, first=limit)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr.decode()


# Signals to the command line.

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


def begin(script: str, first: str = ":") -> subprocess.Popen[bytes]:
    process = start("load", FIXTURE, script=script, first=first)
    assert process.stderr is not None
    assert process.stderr.readline() == b"ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGINT, 130, b"interrupted\n"),
        (signal.SIGTERM, 143, b"terminated\n"),
        (signal.SIGHUP, 129, b"the terminal was closed\n"),
    ],
)
def test_signals_end_native_code_at_once(number: int, code: int, word: bytes):
    process = begin(NATIVE)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (code, word)


def test_under_a_limit_the_working_process_ends_with_its_parent():
    script = """
import os, time
from mtj_loader.cli import supervise
supervise.supervise_memory_limit()
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


def test_an_ignored_signal_stays_ignored():
    process = begin(NATIVE, first="trap '' INT")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    assert process.communicate(timeout=60) == (b"", b"terminated\n")


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
    assert process.communicate(timeout=60) == (b"", b"interrupted\n")
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
    assert process.stdout.readline() == b"ready\n"
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
    assert process.communicate(timeout=60) == (None, b"")
    assert process.returncode == 128 + signal.SIGPIPE


def test_help_on_a_full_disk():
    code, stderr = limited("exec > /dev/full", "--help")
    assert code == 4
    assert stderr.startswith(
        "error: the operating system reported an error\n  found: [Errno 28] No space left"
    )


# Errors and Ctrl-C in a program that continues.


@pytest.fixture
def owners(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    """Weak references to the memory of every allocated buffer."""
    found: list[weakref.ref] = []
    allocate = buffers.allocate

    def noted(size_bytes: int) -> np.ndarray:
        array = allocate(size_bytes)
        assert array.base is not None
        found.append(weakref.ref(array.base))
        return array

    monkeypatch.setattr(buffers, "allocate", noted)
    return found


def release(owners: list[weakref.ref]) -> None:
    """Checks that no buffer is in memory any longer."""
    gc.collect()  # JAX releases adopted memory during garbage collection
    assert owners
    assert all(owner() is None for owner in owners)


def test_ctrl_c_ends_threads_and_frees_memory(monkeypatch: pytest.MonkeyPatch, owners: list):
    plan = mtj_loader.plan(FIXTURE, "mp=8")
    read, calls = plan.checkpoint.storage.read_into, []

    def interrupted(path: str, offset_bytes: int, buffer: np.ndarray) -> None:
        calls.append(offset_bytes)
        if len(calls) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        read(path, offset_bytes, buffer)

    monkeypatch.setattr(plan.checkpoint.storage, "read_into", interrupted)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt) as kept:
        mtj_loader.load(plan=plan)
    assert len(calls) < 60  # of hundreds
    assert set(threading.enumerate()) <= before
    del kept
    release(owners)


def fail_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Streamer, "_check_finite", refuse)


def fail_comparing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_params, "_compare", refuse)


def refuse(_: object) -> int:
    raise StorageError("at the very end")


@pytest.mark.parametrize("fail", [fail_reading, fail_comparing])
def test_a_kept_error_has_its_variables_but_not_the_parameters(
    fail: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, owners: list
):
    """A debugger sees the variables of every function; at most a few batches stay in memory."""
    monkeypatch.setattr(buffers.AdoptedBuffers, "batch_bytes", 100_000)
    fail(monkeypatch)
    before = live_bytes()
    with pytest.raises(StorageError, match="at the very end") as kept:
        mtj_loader.load(FIXTURE, "mp=8")
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(kept.value.__traceback__)]
    assert all(frames)
    assert any("streamer" in variables or "stats" in variables for variables in frames)
    assert live_bytes() - before < 1_000_000  # of 7.6 MB
    assert sum(owner() is not None for owner in owners) < len(owners) / 4
    del kept, frames
    release(owners)


def live_bytes() -> int:
    """The size of all arrays in this process."""
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


# A lack of resources.


def test_a_failed_read_names_file_and_byte(monkeypatch: pytest.MonkeyPatch):
    preadv, calls = os.preadv, []

    def failing(descriptor: int, views: list, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 30:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", failing)
    result = CliRunner().invoke(app, ["load", str(FIXTURE), "--mesh", "mp=1"])
    assert result.exit_code == 4
    assert result.stderr.startswith("error: a read at byte ")
    assert f"{calls[29]:,}" in result.stderr
    assert "safetensors\n  found: Input/output error" in result.stderr


def no_mapping(*_: object, **__: object) -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def no_scratch(*_: object) -> None:
    raise MemoryError("Unable to allocate 1.00 MiB for an array")


@pytest.mark.parametrize(
    ("where", "name", "fails", "needed"),
    [
        (mmap, "mmap", no_mapping, r"[78],\d{3},\d{3} contiguous bytes"),
        (Streamer, "_scratch", no_scratch, "Unable to allocate 1.00 MiB for an array"),
    ],
    ids=["main thread", "worker"],
)
def test_no_memory(
    where: object, name: str, fails: Callable, needed: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(where, name, fails)
    words = rf"out of memory on the host\n  expected: {needed}\n  found: .* within "
    with pytest.raises(MemoryLimitError, match=words):
        mtj_loader.load(FIXTURE, "mp=8")


def convert_it(plan: LoadPlan) -> None:
    mtj_loader.convert(plan.checkpoint.location, dtype="float16")


def load_it(plan: LoadPlan) -> None:
    mtj_loader.load(plan=plan)


@pytest.mark.parametrize("work", [load_it, convert_it])
def test_no_thread(
    work: Callable[[LoadPlan], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = mtj_loader.plan(neox.write(tmp_path / "model"), "mp=2")

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(MachineError, match="the system cannot start another thread"):
        work(plan)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Limits of real processes.


@pytest.mark.parametrize("limit", [60, 300, 600], ids="{} MiB".format)
def test_too_little_memory_to_start(limit: int):
    code, stderr = limited(f"ulimit -v {limit << 10}", "load", FIXTURE, "--mesh", "mp=8")
    assert code == 4
    exceeded = "error: the process exceeded the limit of its address space\n  expected: 1 to 2 GB"
    assert stderr.startswith(exceeded)
    assert f"found: {limit << 20:,} bytes (" in stderr
    assert stderr.endswith("hint: ulimit -v sets the limit\n")


LATE = """
import resource, sys
import jax
import mtj_loader
import mtj_loader.loading.load_params

jax.devices()
plan = mtj_loader.plan(sys.argv[1], "mp=1")
mtj_loader.loading.load_params.check_memory = lambda *_: None  # memory gets short after it
pages = int(open("/proc/self/statm").read().split()[0])
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
    first, needed, found, hint = stderr.decode().splitlines()
    assert first == "out of memory on the host"
    assert needed == "  expected: 79,968,000 contiguous bytes"
    assert found.endswith(" within the limit of the address space (ulimit -v)")
    assert hint.startswith("  hint: ")


def test_a_bug_under_a_limit_is_reported_as_a_bug(tmp_path: Path):
    script = NATIVE.replace("load_source=load", "load_source=None").partition("main(sys")[0]
    command = "main(['load', 'x'])"
    log = tmp_path / "log"  # a seekable file; the child process has a pipe
    code, _ = limited(f"ulimit -v 4000000; exec 2> {log}", script=script + command)
    assert code == 1
    assert log.read_text().startswith("error: unexpected TypeError: 'NoneType'")


def test_a_signal_reaches_a_process_under_a_limit():
    telling = NATIVE.replace("sys.stderr.write", "os.write(1, b'ready\\n') or len").replace(
        "import hashlib", "import os, hashlib"
    )
    process = start("load", FIXTURE, script=telling, first="ulimit -v 10000000")
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    assert process.communicate(timeout=60) == (b"", b"terminated\n")
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
    code, stderr = limited(limit, "load", FIXTURE, "--mesh", "mp=8")
    assert code == 4
    assert stderr.startswith(words)
