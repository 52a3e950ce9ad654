"""Several hosts from the command line: joining, output, and parents that supervise a child."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mtj_loader.cli import supervise
from mtj_loader.cli.cluster import Cluster
from mtj_loader.cli.shared_options import Machine
from mtj_loader.distributed.join import ProcessConfig, join_processes
from mtj_loader.errors import HostError, UsageError

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-m", "mtj_loader.cli"]
WAIT_SECONDS = 60  # for a process that ends, on a busy machine


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def process_options(port: int, index: int, count: int = 2) -> list[str]:
    where = f"--coordinator=127.0.0.1:{port}"
    return [where, f"--processes={count}", f"--process-id={index}", "--cpu-devices=2"]


@contextmanager
def started(*programs: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts processes, each in its own group; kills the groups at the end."""
    running = [
        subprocess.Popen(
            program,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for program in programs
    ]
    try:
        yield running
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=WAIT_SECONDS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support import neox  # noqa: PLC0415

    return neox.write(tmp_path_factory.mktemp("checkpoint"), max_position_embeddings=4096)


def test_process_0_prints_and_writes_and_every_host_verifies(
    checkpoint: Path, tmp_path: Path
) -> None:
    port = free_port()
    load = [*CLI, "load", str(checkpoint), "--mesh=mp=4", "--verify", "--json"]
    load += [f"--digests={tmp_path / 'digests.json'}"]
    with started(*([*load, *process_options(port, index)] for index in range(2))) as (
        first,
        second,
    ):
        output, _ = first.communicate(timeout=WAIT_SECONDS)
        nothing, notes = second.communicate(timeout=WAIT_SECONDS)
    document = json.loads(output)
    assert (first.returncode, second.returncode) == (0, 0)
    assert nothing == ""
    assert "verifying" not in notes
    hosts = document["report"]["hosts"]
    assert [host["host"] for host in hosts] == [0, 1]
    assert document["report"]["bytes_read"] == hosts[0]["bytes_read"] > 0
    everywhere = 4 * document["report"]["device_bytes"]
    assert document["verified_bytes"] == everywhere
    assert document["digests"] == json.loads((tmp_path / "digests.json").read_text())
    of = document["digests"]["of"].values()
    assert {tuple(digests) for digests in of} == {("0", "1", "2", "3")}


def test_a_file_that_cannot_be_written_is_reported_before_the_load(checkpoint: Path) -> None:
    port = free_port()
    load = [*CLI, "load", str(checkpoint), "--mesh=mp=4", "--report=/no/such/folder/x.json"]
    with started(*([*load, *process_options(port, index)] for index in range(2))) as hosts:
        stderr = [process.communicate(timeout=WAIT_SECONDS)[1] for process in hosts]
    assert [process.returncode for process in hosts] == [4, 4]
    assert "error: cannot write the file\n  file: /no/such/folder/x.json" in stderr[0]
    assert "error: host 0 failed in 'files': cannot write the file" in stderr[1]


def test_different_prompts_are_reported_on_every_host(checkpoint: Path) -> None:
    port = free_port()
    generate = [*CLI, "generate", str(checkpoint), "--mesh=mp=4"]
    prompts = ["--ids=1 2 3"], ["--ids=1 2 4", "--seed=7"]
    with started(
        *([*generate, *own, *process_options(port, index)] for index, own in enumerate(prompts))
    ) as hosts:
        stderr = [process.communicate(timeout=WAIT_SECONDS)[1] for process in hosts]
    for process, words in zip(hosts, stderr, strict=True):
        assert process.returncode == 2
        assert "error: the hosts are not about to generate the same\n  found: prompts: " in words
        assert "seed: 7 on host 1, 0 on host 0" in words


def test_both_parents_report_that_process_0_was_killed(checkpoint: Path) -> None:
    port = free_port()
    generate = [*CLI, "generate", str(checkpoint), "--ids=1 2 3", "--max-new-tokens=4000"]
    generate += ["--mesh=mp=4"]
    with started(*([*generate, *process_options(port, index)] for index in range(2))) as (
        first,
        second,
    ):
        assert first.stdout is not None
        assert first.stdout.read(1)  # generation has started
        (work,) = children(first.pid)
        (other,) = children(second.pid)
        os.kill(work, signal.SIGKILL)
        stderr = [process.communicate(timeout=WAIT_SECONDS)[1] for process in (first, second)]
    assert (first.returncode, second.returncode) == (4, 4)
    assert f"error: host 0: process {work} was killed by SIGKILL" in stderr[0]
    aborted = (
        f"error: host 1: process {other} was killed by SIGABRT\n  found: JAX aborts every host"
    )
    lost = "error: the connection to host 0 is lost"  # if Python code could still report it
    assert aborted in stderr[1] or lost in stderr[1]


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


WORK = """
import os, sys, time
from mtj_loader.cli.supervise import supervise_host
with supervise_host(["load", "--coordinator=here:1", "--process-id", "3"]):
    print(os.getpid(), flush=True)
    time.sleep({seconds})
    sys.exit({code})
"""


@contextmanager
def supervised_work(seconds: float = 60, code: int = 0) -> Iterator[tuple[subprocess.Popen, int]]:
    """A parent and the process identifier of its child, without JAX."""
    program = WORK.format(seconds=seconds, code=code)
    with started([sys.executable, "-c", program]) as (parent,):
        assert parent.stdout is not None
        yield parent, int(parent.stdout.readline())


@pytest.mark.parametrize("code", [0, 3])
def test_the_parent_exits_with_the_code_of_its_child(code: int) -> None:
    with supervised_work(seconds=0, code=code) as (parent, child):
        assert parent.pid != child
        assert parent.wait(WAIT_SECONDS) == code


def test_ctrl_c_reaches_the_child() -> None:
    with supervised_work() as (parent, child):
        parent.send_signal(signal.SIGINT)
        assert parent.wait(WAIT_SECONDS) == 130
        assert not Path(f"/proc/{child}").exists()


def test_a_child_that_a_signal_ends_is_named() -> None:
    with supervised_work() as (parent, child):
        parent.send_signal(signal.SIGTERM)
        _, stderr = parent.communicate(timeout=WAIT_SECONDS)
    assert f"host 3: process {child} was killed by SIGTERM" in stderr


@pytest.mark.parametrize("stopped", [False, True])
def test_the_child_ends_with_its_parent(stopped: bool) -> None:
    with supervised_work() as (parent, child):
        if stopped:
            os.kill(child, signal.SIGSTOP)
        parent.kill()
        parent.wait(WAIT_SECONDS)
        deadline = time.monotonic() + WAIT_SECONDS
        while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["load", "x", "--coordinator", "a:1"], True),
        (["generate", "x", "--coordinator=a:1"], True),
        (["load", "x"], False),
        (["inspect", "x"], False),
        ([], False),
    ],
)
def test_commands_that_are_supervised(arguments: list[str], expected: bool) -> None:
    assert supervise.joins_other_hosts(arguments) is expected


@pytest.mark.parametrize(("command", "expected"), [("load", True), ("plan", False)])
def test_commands_with_devices_are_supervised_on_a_tpu_machine(
    monkeypatch: pytest.MonkeyPatch, command: str, expected: bool
) -> None:
    monkeypatch.setattr(supervise, "on_cloud_tpu", lambda: True)
    assert supervise.joins_other_hosts([command, "x"]) is expected


def test_this_machine_has_no_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert not supervise.on_cloud_tpu()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"processes": 2, "process_id": 0}, "no --coordinator"),
        ({"coordinator": "a:1"}, "no --processes, --process-id"),
    ],
)
def test_missing_options_are_named(given: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Cluster(**given).join(Machine())


@pytest.mark.parametrize(
    ("coordinator", "processes", "process_id", "words"),
    [
        ("a:1", 2, 2, "0 to 1, for 2 processes"),
        ("a:1", 0, 0, "invalid process id"),
        ("a", 2, 0, "HOST:PORT"),
        (":80", 2, 0, "HOST:PORT"),
        ("a:b", 2, 0, "HOST:PORT"),
        ("a:70000", 2, 0, "HOST:PORT"),
    ],
)
def test_invalid_process_settings(
    coordinator: str, processes: int, process_id: int, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        ProcessConfig(coordinator, processes, process_id)


def test_an_ipv6_address() -> None:
    assert ProcessConfig("[::1]:80", 1, 0).address == ("::1", 80)


def test_a_port_in_use() -> None:
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(HostError, match=f"cannot listen on port {port}"):
            join_processes(ProcessConfig(f"127.0.0.1:{port}", 2, 0), timeout_seconds=1)


def test_no_coordinator() -> None:
    with pytest.raises(HostError, match=r"no answer at 127.0.0.1:\d+ for 0.1 s"):
        join_processes(ProcessConfig(f"127.0.0.1:{free_port()}", 2, 1), timeout_seconds=0.1)


def test_not_all_processes_join() -> None:
    arguments = [*CLI, "load", "x", *process_options(free_port(), 0), "--host-timeout=2"]
    with started(arguments) as (process,):
        _, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 4
    assert stderr.startswith("error: not all 2 processes connected to 127.0.0.1:")
