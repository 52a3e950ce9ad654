"""Hosts for tests: one process that forks the hosts of several loads and waits for them.

    python -m tests.support.host_program FOLDER    reads cases.json; writes <case>-<host>.jsonl

Importing JAX takes longer than most of what is tested here, so it is done once. Every host is a
real process with two virtual devices of its own. Faults are injected here, never by the package.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

import mtj_loader
from mtj_loader.distributed import agreement, host_group
from mtj_loader.distributed.host_group import HostGroup
from mtj_loader.errors import MtjLoaderError
from mtj_loader.loading.verify import verify
from mtj_loader.storage.local import LocalStorage

DEVICES = 2  # of each host
HEARTBEAT_SECONDS = 4.0  # until a host without heartbeats is reported, where a test waits for it
JOIN_SECONDS = 6.0  # until a host that does not join is missing
CASE_SECONDS = 120.0  # a case that takes longer is killed
_AT_ONCE = 3  # cases, which mostly wait

Json = dict[str, Any]


@dataclass
class Host:
    """One host of a case.

    Attributes:
      index, count: its number, and the number of hosts.
      output: the file for the result of each step.
      reads: [method, file, offset, bytes] of all reads of the step.
    """

    index: int
    count: int
    output: Path
    reads: list[list[object]] = field(default_factory=list)

    def write(self, **result: object) -> None:
        """Appends a line to the output."""
        with self.output.open("a") as file:
            file.write(json.dumps(result) + "\n")

    def run_step(self, step: Json) -> None:
        """Runs one load and its queries; writes the results, or the error."""
        self.reads.clear()
        path, options = step["paths"][self.index], step["options"][self.index]
        self._install_fault(step["fault"], Path(path))
        waits = step["fault"].get("kind") in ("kill", "stop")
        host_group.HEARTBEAT_TIMEOUT_SECONDS = HEARTBEAT_SECONDS if waits else CASE_SECONDS
        late = JOIN_SECONDS if waits and step["fault"]["phase"] == "join" else CASE_SECONDS
        try:
            model = mtj_loader.load(path, host_timeout=late, progress=False, **options)
            reads = list(self.reads)
            answers = {name: QUERIES[name](model) for name in step["queries"]}
            self.write(report=model.report.to_dict(), reads=reads, **answers)
        except MtjLoaderError as error:
            self.write(error=str(error), exit_code=error.exit_code, type=type(error).__name__)

    def _install_fault(self, fault: Json, path: Path) -> None:
        """Injects the fault when this host starts the phase; `join` is the start of the load."""

        def begin(phase: str) -> None:
            if (fault.get("host"), fault.get("phase")) == (self.index, phase):
                self.write(injected=phase)
                FAULTS[fault["kind"]](path)

        def phase(hosts: HostGroup, name: str) -> AbstractContextManager[None]:
            begin(name)
            return _phase(hosts, name)

        setattr(HostGroup, "phase", phase)  # noqa: B010 -- until the next step
        begin("join")


_phase = HostGroup.phase


def generate_connected(model: mtj_loader.Model) -> object:
    """As the command line does: failures of other hosts are noticed."""
    with host_group.connect_hosts() as hosts, hosts.phase("generate"):
        return model.generate(IDS, max_new_tokens=6, temperature=0)


QUERIES: dict[str, Callable[[mtj_loader.Model], object]] = {
    "logits": lambda model: np.asarray(model.logits(IDS)).tolist(),
    "greedy": lambda model: model.generate(IDS, max_new_tokens=6, temperature=0),
    "connected": generate_connected,
    "sampled": lambda model: model.generate(IDS[:3], max_new_tokens=6, seed=5),
    "stream": lambda model: [i for ids in model.stream(IDS[0], max_new_tokens=6) for i in ids],
    "state": lambda model: np.asarray(model.state()["step"].addressable_data(0)).tolist(),
    "adapted": lambda model: np.asarray(model.with_adapter(ADAPTER).logits(IDS)).tolist(),
    "verified": lambda model: verify(model.plan, model.params),
}
IDS = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
ADAPTER = "adapter"  # beside the cases

FAULTS: dict[str, Callable[[Path], object]] = {
    "kill": lambda path: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda path: os.kill(os.getpid(), signal.SIGSTOP),
    "missing": lambda path: (path / "model.safetensors").unlink(),
    "version": lambda path: setattr(agreement, "version", lambda: "0.0.1"),
}


_reading = threading.local()


def _record_reads(host: Host, method: str) -> None:
    """Records the calls of a method of LocalStorage, except those from another such call."""
    read = getattr(LocalStorage, method)

    def counted(storage: LocalStorage, path: str, offset: int, what: Any) -> object:
        if getattr(_reading, "inside", False):
            return read(storage, path, offset, what)
        size = what if isinstance(what, int) else memoryview(what).nbytes
        host.reads.append([method, path, offset, size])
        _reading.inside = True
        try:
            return read(storage, path, offset, what)
        finally:
            _reading.inside = False

    setattr(LocalStorage, method, counted)


def _run_host(host: Host, port: int, steps: list[Json]) -> None:
    """Joins the other hosts and runs the steps."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.distributed.initialize(f"127.0.0.1:{port}", host.count, host.index)
    for method in ("read", "read_into"):
        _record_reads(host, method)
    for step in steps:
        host.run_step(step)


def _fork(host: Host, port: int, steps: list[Json]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with host.output.with_suffix(".log").open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        _run_host(host, port, steps)
        code = 0
    except BaseException:  # noqa: BLE001 -- the process ends here, and no other code may run
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@dataclass
class Running:
    """The hosts of a case that have not ended."""

    name: str
    children: dict[int, int]  # process → host
    started: float = field(default_factory=time.monotonic)
    codes: dict[int, int] = field(default_factory=dict)

    def poll(self) -> bool:
        """Whether all have ended; kills those left if they are stopped or late."""
        for child in list(self.children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                self.codes[self.children.pop(child)] = os.waitstatus_to_exitcode(status)
        late = time.monotonic() - self.started > CASE_SECONDS
        if late or (self.codes and all(map(_is_stopped, self.children))):
            for child in self.children:
                os.kill(child, signal.SIGKILL)
        return not self.children


def _is_stopped(child: int) -> bool:
    return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def main(folder: Path) -> None:
    """Runs all cases, a few at a time, and writes the exit codes."""
    os.chdir(folder)
    waiting: list[Json] = json.loads(Path("cases.json").read_text())
    running: list[Running] = []
    codes: dict[str, dict[int, int]] = {}
    while waiting or running:
        while waiting and len(running) < _AT_ONCE:
            running.append(_start(waiting.pop(0)))
        time.sleep(0.02)
        for case in [case for case in running if case.poll()]:
            running.remove(case)
            codes[case.name] = case.codes
    Path("codes.json").write_text(json.dumps(codes))


def _start(case: Json) -> Running:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    name, count = case["name"], case["hosts"]
    hosts = [Host(index, count, Path(f"{name}-{index}.jsonl")) for index in range(count)]
    return Running(name, {_fork(host, port, case["steps"]): host.index for host in hosts})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
