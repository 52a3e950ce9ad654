"""Faults of one machine: signals, files that change, limits on memory, files and threads.

All faults are injected into the real command line, except the failed read, which is simulated.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import sparse
from benchmarks.checkpoint import SHAPES
from benchmarks.faults.fault import (
    DEADLINE_SECONDS,
    FIXTURE,
    Fault,
    Outcome,
    Process,
    command,
    outcome,
    start,
)

_FILE = "model-00001-of-00001.safetensors"
_IMPORT_SECONDS = 0.3  # by then Python has started, and imports are still running
_UNDER_WAY_BYTES = 100_000_000  # of 2.8 GB that are read
_ONE_FILE_BYTES = 1 << 40
_HUB = {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}

Start = Callable[[Path], Process]


def _model(scratch: Path, name: str = "pythia-1.4b") -> Path:
    """Writes a checkpoint of real size in one file of zeros."""
    shape = SHAPES[name]
    sparse.write(scratch / "model", shape.config(), shape.tensors(), _ONE_FILE_BYTES)
    return scratch / "model"


def _importing(scratch: Path) -> Process:
    running = command(scratch, "load", FIXTURE, "--mesh", "mp=1")
    time.sleep(_IMPORT_SECONDS)
    return running


def _asking_the_hub(scratch: Path) -> Process:
    """The server accepts the connection and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    running = command(scratch, "load", "a/b", environment=_HUB | {"HF_ENDPOINT": address})
    server.settimeout(DEADLINE_SECONDS)
    server.accept()[0].detach()  # both stay open until this process ends
    server.detach()
    return running


def _streaming(scratch: Path, *options: str) -> Process:
    folder = _model(scratch)
    running = command(scratch, "load", folder, "--mesh", "mp=1", *options)
    running.wait_for(lambda: _read_bytes(running) > _UNDER_WAY_BYTES)
    return running


def _verifying(scratch: Path) -> Process:
    folder = _model(scratch, "pythia-410m")
    running = command(scratch, "load", folder, "--mesh", "mp=1", "--verify")
    running.wait_for(lambda: running.printed("verifying"))
    return running


def _compiling(scratch: Path) -> Process:
    running = command(scratch, "generate", FIXTURE, "--mesh", "mp=1", "--prompt", "O")
    running.wait_for(lambda: running.printed("MB read in"))
    return running


def _converting(scratch: Path) -> Process:
    folder = _model(scratch, "pythia-410m")
    running = command(scratch, "convert", folder, "--dtype", "float16")
    running.wait_for(lambda: list(scratch.glob(".*.partial/*.safetensors")))
    return running


def _in_a_library(scratch: Path) -> Process:
    """A program that survives Ctrl-C and prints its threads on stdout."""
    folder = _model(scratch)
    running = start(scratch, ["-c", _LIBRARY, folder])
    running.wait_for(lambda: _read_bytes(running) > _UNDER_WAY_BYTES)
    return running


_LIBRARY = """
import sys, threading
import mtj_loader
try:
    mtj_loader.load(sys.argv[1], "mp=1")
except KeyboardInterrupt:
    sys.stderr.write("KeyboardInterrupt, caught by the caller\\n")
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        print(thread.name)
"""


def _send_signal(begin: Start, number: signal.Signals, scratch: Path) -> Outcome:
    running = begin(scratch)
    injected = time.perf_counter()
    running.process.send_signal(number)
    return outcome([running], injected, partial(_left_over, scratch, running))


def _left_over(scratch: Path, running: Process) -> list[str]:
    """Threads that are left in a program that uses the library, and new files."""
    known = {"model", running.stdout.name, running.stderr.name}
    files = [f"file {path.name}" for path in scratch.iterdir() if path.name not in known]
    return files + [f"thread {line}" for line in running.stdout.read_text().splitlines()]


def _read_bytes(running: Process) -> int:
    """Bytes that read calls of the process returned so far."""
    lines = Path(f"/proc/{running.process.pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))


def _damage(damage: Callable[[Path], object], scratch: Path) -> Outcome:
    """Damages the file that is being read."""
    running = _streaming(scratch)
    injected = time.perf_counter()
    damage(scratch / "model" / _FILE)
    return outcome([running], injected)


def _replace(file: Path) -> None:
    other = file.with_suffix(".other")
    other.write_bytes(b"another file")
    other.rename(file)


_FAILING_READ = """
import errno, itertools, os, sys
preadv, calls = os.preadv, itertools.count()
def failing(*arguments):
    if next(calls) == 50:
        os.write(1, b"failing")
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return preadv(*arguments)
os.preadv = failing
from mtj_loader.cli import main
main(sys.argv[1:])
"""


def _fail_read(scratch: Path) -> Outcome:
    folder = _model(scratch, "pythia-410m")
    running = start(scratch, ["-c", _FAILING_READ, "load", folder, "--mesh", "mp=1"])
    running.wait_for(lambda: running.printed("failing"))
    return outcome([running], time.perf_counter())


def _run_limited(limit: str, scratch: Path, name: str = "load") -> Outcome:
    """Runs with a limit from the start; the seconds are those of the whole run."""
    folder = _model(scratch)
    options = {"load": ["--mesh", "mp=1"], "convert": ["--dtype", "float16"]}[name]
    injected = time.perf_counter()
    running = command(scratch, name, folder, *options, first=limit)
    return outcome([running], injected, partial(_left_over, scratch, running))


_PHASES: dict[str, Start] = {
    "import": _importing,
    "asking the hub": _asking_the_hub,
    "streaming": _streaming,
    "verify": _verifying,
    "compiling": _compiling,
    "convert": _converting,
}
_DAMAGES: dict[str, Callable[[Path], object]] = {
    "file truncated": lambda file: os.truncate(file, 1000),
    "file replaced": _replace,
    "file removed": Path.unlink,
}
_LIMITS = {
    "memory: 50 MiB": "ulimit -v 51200",
    "memory: 500 MiB": "ulimit -v 512000",
    "memory: 3 GiB, of parameters 2.6": "ulimit -v 3145728",
    "6 open files": "ulimit -n 6",
    "no thread: stacks of 100 TB": "ulimit -s 100000000000",
}

FAULTS = (
    *(
        Fault(number.name, moment, partial(_send_signal, begin, number))
        for moment, begin in _PHASES.items()
        for number in (signal.SIGINT, signal.SIGTERM)
    ),
    Fault("SIGHUP", "streaming", partial(_send_signal, _streaming, signal.SIGHUP)),
    Fault("SIGINT", "library", partial(_send_signal, _in_a_library, signal.SIGINT)),
    *(
        Fault(name, "streaming", partial(_damage, damage)) for name, damage in _DAMAGES.items()
    ),
    Fault("read error (EIO)", "streaming", _fail_read),
    *(Fault(name, "start", partial(_run_limited, limit)) for name, limit in _LIMITS.items()),
    Fault("files of 100 MiB at most", "convert",
          partial(_run_limited, "ulimit -f 204800", name="convert")),
)  # fmt: skip
