"""Faults of one of two hosts: its process dies, is stopped, or lacks a file.

Both are processes on this machine with two virtual devices each, started with `mtj-loader`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks import sparse
from benchmarks.checkpoint import SHAPES
from benchmarks.faults.fault import FIXTURE, Fault, Outcome, Process, command, outcome

_ONE_FILE_BYTES = 1 << 40
_UNDER_WAY_BYTES = 100_000_000  # of 2.8 GB that are read
_LATE_SECONDS = 20  # instead of 300, so that the table takes minutes

Hosts = Sequence[Process]
Begin = Callable[[Path], Hosts]
Inject = Callable[[Process], None]


def _start(scratch: Path, name: str, paths: Sequence[Path], *options: str) -> Hosts:
    """Starts `mtj-loader` twice, as hosts 0 and 1."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = ("--cpu-devices=2", f"--host-timeout={_LATE_SECONDS}", "--processes=2", *options)
    where = f"--coordinator=127.0.0.1:{port}"
    return [
        command(scratch, name, path, "--mesh=mp=4", where, f"--process-id={index}", *common)
        for index, path in enumerate(paths)
    ]


def _joining(scratch: Path) -> Hosts:
    """Host 0 waits while host 1 imports."""
    hosts = _start(scratch, "load", [FIXTURE, FIXTURE])
    hosts[0].wait_for(lambda: all(map(_children, hosts)))
    return hosts


def _reading(scratch: Path) -> Hosts:
    shape = SHAPES["pythia-1.4b"]
    sparse.write(scratch / "model", shape.config(), shape.tensors(), _ONE_FILE_BYTES)
    hosts = _start(scratch, "load", [scratch / "model"] * 2)
    for host in hosts:
        host.wait_for(partial(_has_read, host))
    return hosts


def _generating(scratch: Path) -> Hosts:
    prompt = ("--ids=1 2 3", "--max-new-tokens=500")
    hosts = _start(scratch, "generate", [FIXTURE, FIXTURE], *prompt)
    hosts[0].wait_for(lambda: hosts[0].stdout.stat().st_size)
    return hosts


def _children(host: Process) -> list[int]:
    """The child that does the work; the parent only watches it."""
    pid = host.process.pid
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _has_read(host: Process) -> bool:
    for child in _children(host):
        lines = Path(f"/proc/{child}/io").read_text().splitlines()
        return int(lines[0].removeprefix("rchar: ")) > _UNDER_WAY_BYTES
    return False


def _send_signal(begin: Begin, victim: int, number: signal.Signals, scratch: Path) -> Outcome:
    hosts = begin(scratch)
    child = _children(hosts[victim])[0]
    injected = time.perf_counter()
    os.kill(child, number)
    if number != signal.SIGSTOP:
        return outcome([hosts[1 - victim], hosts[victim]], injected)
    found = outcome([hosts[1 - victim]], injected)
    os.kill(child, signal.SIGKILL)
    hosts[victim].process.wait()
    return found


def _without_file(scratch: Path) -> Outcome:
    shutil.copytree(FIXTURE, scratch / "copy")
    next((scratch / "copy").glob("*-00002-of-*.safetensors")).unlink()
    hosts = _start(scratch, "load", [FIXTURE, scratch / "copy"])
    return outcome(hosts, hosts[0].started)


def _with_another_option(scratch: Path) -> Outcome:
    with socket.create_server(("127.0.0.1", 0)) as free:
        where = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    common = ("--mesh=mp=4", "--cpu-devices=2", "--processes=2", where)
    hosts = [
        command(scratch, "load", FIXTURE, *common, f"--process-id={index}", f"--dtype={dtype}")
        for index, dtype in enumerate(("float32", "float16"))
    ]
    return outcome(hosts, hosts[0].started)


_PHASES: dict[str, Begin] = {
    "joining": _joining,
    "reading": _reading,
    "making text": _generating,
}
_SIGNALS = (signal.SIGKILL, signal.SIGSTOP)

FAULTS = [
    *(
        Fault(
            f"{number.name} on host {victim} of 2",
            phase,
            partial(_send_signal, begin, victim, number),
        )
        for phase, begin in _PHASES.items()
        for number in _SIGNALS
        for victim in (1, 0)
    ),
    *(
        Fault(
            f"{number.name} on host 1 of 2", "reading", partial(_send_signal, _reading, 1, number)
        )
        for number in (signal.SIGINT, signal.SIGTERM)
    ),
    Fault("a file is missing on host 1 of 2", "planning", _without_file),
    Fault("another --dtype on host 1 of 2", "planning", _with_another_option),
]
