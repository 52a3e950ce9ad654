"""Communication between hosts, with threads as hosts and a dictionary as JAX's store."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from jaxlib import _jax

import mtj_loader
from mtj_loader.distributed import host_group, jax_runtime, key_value_store
from mtj_loader.distributed.agreement import disagreement, plan_facts
from mtj_loader.distributed.host_group import (
    HostGroup,
    call_on_devices,
    connect_hosts,
    report_termination,
    wait_for_arrays,
)
from mtj_loader.distributed.hosts import SINGLE_HOST, Failure
from mtj_loader.distributed.key_value_store import KeyValueStore, call_with_timeout
from mtj_loader.distributed.shared_headers import open_on_all_hosts, pack, unpack
from mtj_loader.errors import CheckpointError, HostError, MemoryLimitError, MeshError, UsageError
from mtj_loader.formats.checkpoint import open_checkpoint
from mtj_loader.options import Source
from tests.support import neox

LONG = 60.0


class Client:
    """The part of JAX's client that is used, over a dictionary that threads share."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.changed = threading.Condition()

    def blocking_key_value_get_bytes(self, key: str, milliseconds: int) -> bytes:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise JaxRuntimeError("DEADLINE_EXCEEDED: no such key")
            return self.values[key]

    def key_value_set_bytes(self, key: str, value: bytes, overwrite: bool = False) -> None:
        with self.changed:
            if key in self.values and not overwrite:
                raise JaxRuntimeError("ALREADY_EXISTS: the key exists")
            self.values[key] = value
            self.changed.notify_all()

    def key_value_delete(self, folder: str) -> None:
        for key in [key for key in self.values if key.startswith(f"{folder}/")]:
            del self.values[key]

    def key_value_dir_get_bytes(self, folder: str) -> list[tuple[str, bytes]]:
        return [(k, v) for k, v in self.values.items() if k.startswith(f"{folder}/")]


def run_on_hosts(
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    work: Callable[[HostGroup], object],
    timeout_seconds: float = LONG,
    *,
    client: Client | None = None,
    number: int = 0,
) -> list[Any]:
    """Runs `work` on several hosts at once; returns the result or the error of each."""
    monkeypatch.setattr(host_group, "_load_numbers", itertools.repeat(number))
    monkeypatch.setattr(host_group.jax, "devices", list)
    client = client or Client()

    def run(index: int) -> object:
        hosts = HostGroup(KeyValueStore(client, index, count), timeout_seconds)
        try:
            with hosts.session():
                return work(hosts)
        except BaseException as error:  # noqa: BLE001 -- it is the outcome
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_values_are_gathered_in_the_order_of_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    made = run_on_hosts(monkeypatch, 3, lambda hosts: hosts.gather("x", b"of %d" % hosts.index))
    assert made == [[b"of 0", b"of 1", b"of 2"]] * 3


def test_the_keys_of_the_previous_load_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    for number in range(3):
        run_on_hosts(
            monkeypatch, 2, lambda hosts: hosts.gather("x", b"y"), client=client, number=number
        )
    assert {key.split("/")[1] for key in client.values} == {"2"}


def test_a_timeout_of_one_call_ends_all_waiting_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Silent(Client):
        def key_value_set_bytes(self, key: str, value: bytes, overwrite: bool = False) -> None:
            silent.wait(LONG)

    silent, shared = threading.Event(), KeyValueStore(Silent(), 1, 2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(shared.overwrite, "a", b"")  # its limit is 10 s
        while not [t for t in threading.enumerate() if t.name == "mtj_loader_call"]:
            time.sleep(0.001)
        monkeypatch.setattr(key_value_store, "ANSWER_TIMEOUT_SECONDS", 0.1)
        with pytest.raises(HostError, match=r"host 0 has not answered for 0\.1 s"):
            shared.overwrite("b", b"")
        with pytest.raises(HostError, match="host 0 has not answered"):
            waiting.result(timeout=5)
    silent.set()


def test_only_process_0_makes_the_broadcast_value(monkeypatch: pytest.MonkeyPatch) -> None:
    large = np.random.default_rng(0).bytes(5 << 20)  # nothing compresses it
    makers: list[int] = []

    def work(hosts: HostGroup) -> bytes:
        return hosts.broadcast("x", lambda: (makers.append(hosts.index), large)[1])

    assert run_on_hosts(monkeypatch, 2, work) == [large, large]
    assert makers == [0]


def test_an_error_on_one_host_is_reported_on_every_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(hosts: HostGroup) -> None:
        with hosts.phase("read"):
            if hosts.index == 1:
                raise CheckpointError("the file is truncated", file="a")

    first, second, third = run_on_hosts(monkeypatch, 3, work)
    assert str(first) == str(third) == "host 1 failed in 'read': the file is truncated\n  file: a"
    assert isinstance(second, CheckpointError)
    assert (first.host, first.exit_code) == (1, 3)


def test_a_busy_host_stops_when_another_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(hosts: HostGroup) -> None:
        with hosts.phase("read"):
            if hosts.index == 0:
                raise MemoryLimitError("out of memory")
            while True:
                hosts.check()
                time.sleep(0.01)

    first, second = run_on_hosts(monkeypatch, 2, work)
    assert isinstance(first, MemoryLimitError)
    assert str(second) == "host 0 failed in 'read': out of memory"


def test_late_hosts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(hosts: HostGroup) -> None:
        with hosts.phase("read"):
            while hosts.index in (1, 2):
                hosts.check()
                time.sleep(0.01)

    found = run_on_hosts(monkeypatch, 4, work, timeout_seconds=2)
    message = {str(error).rpartition(" of host")[0] for error in found}
    assert message == {"hosts 1, 2 did not finish 'read' within 2 s"}


def test_a_host_without_heartbeats_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_group, "HEARTBEAT_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(host_group, "_LEAVE_SECONDS", 0.1)
    beat = HostGroup._run_heartbeat
    monkeypatch.setattr(HostGroup, "_run_heartbeat", lambda hosts: hosts.index != 1 and beat(hosts))
    message = threading.Event()

    def work(hosts: HostGroup) -> None:
        hosts._store.overwrite(hosts._key("heartbeat", 1), b"the last")
        try:
            with hosts.phase("read"):
                if hosts.index == 1:
                    message.wait(60)
                    raise KeyboardInterrupt
        finally:
            message.set()

    first, _ = run_on_hosts(monkeypatch, 2, work)
    assert str(first).startswith("no heartbeat from host 1 for 0.5 s: its process died or is")


def test_an_error_of_the_runtime_is_attributed_to_the_missing_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(hosts: HostGroup) -> None:
        with hosts.phase("exchange"):
            if hosts.index == 0:
                raise JaxRuntimeError("Connection closed by peer")
            raise KeyboardInterrupt

    first, _ = run_on_hosts(monkeypatch, 2, work)
    assert str(first) == "host 1 was interrupted in 'exchange'"
    assert first.exit_code == 130


def test_a_terminated_host_is_reported_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(hosts: HostGroup) -> None:
        if hosts.index == 1:
            monkeypatch.setattr(host_group, "_active", [hosts])
            report_termination(143)
            raise SystemExit
        hosts.barrier("end")

    first, _ = run_on_hosts(monkeypatch, 2, work)
    assert str(first) == "host 1 was terminated"
    assert first.exit_code == 143


def test_a_host_that_waits_inside_jax_stops_when_another_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forever = threading.Event()

    def work(hosts: HostGroup) -> object:
        with hosts.phase("generate"):
            if hosts.index == 0:
                raise MemoryLimitError("out of memory")
            monkeypatch.setattr(host_group, "_active", [hosts])
            return call_on_devices(forever.wait)

    _, second = run_on_hosts(monkeypatch, 2, work)
    forever.set()
    assert str(second) == "host 0 failed in 'generate': out of memory"


def test_calls_on_devices_return_and_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call_on_devices(threading.current_thread) is threading.current_thread()
    monkeypatch.setattr(host_group, "_active", [SINGLE_HOST])
    assert call_on_devices(threading.current_thread) is not threading.current_thread()
    with pytest.raises(KeyError):
        call_on_devices(lambda: {}["a"])


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (UsageError("no"), "host 2 failed in 'plan': no", 2),
        (KeyboardInterrupt(), "host 2 was interrupted in 'plan'", 130),
        (SystemExit(143), "host 2 exited in 'plan'", 143),
        (SystemExit("why"), "host 2 exited in 'plan'", 1),
        (MemoryError("much"), "host 2 failed in 'plan': MemoryError: much", 4),
        (KeyError("x"), "host 2 failed in 'plan': KeyError: 'x'", 1),
    ],
)
def test_the_message_on_other_hosts(error: BaseException, message: str, code: int) -> None:
    failure = Failure.from_error(2, "plan", error)
    assert (failure.message, failure.exit_code) == (message, code)


def test_the_message_for_one_late_host() -> None:
    assert (
        Failure.from_timeout([3], "read", 300, 0).message
        == "host 3 did not finish 'read' within 300 s of host 0"
    )


def test_a_call_that_never_returns() -> None:
    with pytest.raises(TimeoutError):
        call_with_timeout(threading.Event().wait, 0.1)
    with pytest.raises(ZeroDivisionError):
        call_with_timeout(lambda: 1 // 0, LONG)


def test_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_value_store, "ANSWER_TIMEOUT_SECONDS", 0.1)
    client = Client()
    monkeypatch.setattr(client, "key_value_set_bytes", lambda *_: threading.Event().wait())
    with pytest.raises(HostError, match=r"host 0 has not answered for 0.1 s"):
        KeyValueStore(client, 1, 2).put("key", b"value")


def test_the_real_store_of_jax() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    service = _jax.get_distributed_runtime_service(address, 1)
    client = _jax.get_distributed_runtime_client(address, 0)
    client.connect()
    try:
        store = KeyValueStore(client, 0, 1)
        large = np.random.default_rng(0).bytes(5 << 20)  # gRPC's default limit is 4 MiB
        store.put("large", large)
        assert store.get("large") == large
        for value in (b"1", b"2"):
            store.set_once("folder/once", value)
            store.overwrite("folder/last", value)
        assert store.list_folder("folder") == {"once": b"1", "last": b"2"}
        store.delete_folder("folder")
        assert store.wait_for("folder/once", 0.1) is None
    finally:
        client.shutdown()
        service.shutdown()


def test_a_lost_connection_to_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()

    def fail(*_: object) -> None:
        raise JaxRuntimeError("UNAVAILABLE: failed to connect\nRPC: GetKeyValue")

    monkeypatch.setattr(client, "blocking_key_value_get_bytes", fail)
    with pytest.raises(HostError, match=r"lost\n  found: UNAVAILABLE: failed to connect$"):
        KeyValueStore(client, 1, 2).get("key")


def test_a_single_host_does_not_wait_and_starts_no_thread() -> None:
    before = threading.active_count()
    with connect_hosts() as hosts, hosts.phase("read"):
        hosts.check()
        hosts.barrier("x")
        assert hosts is SINGLE_HOST
        assert hosts.gather("x", b"1") == [b"1"]
        assert hosts.broadcast("x", lambda: b"2") == b"2"
        assert threading.active_count() == before


def test_processes_that_are_not_connected_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_runtime.jax, "process_count", lambda: 2)
    with pytest.raises(UsageError, match="2 processes share these devices"), connect_hosts():
        pass


def test_waiting_for_devices_checks_the_other_hosts() -> None:
    class Never:
        def is_ready(self) -> bool:
            return False

    def check() -> None:
        raise HostError("host 1 is gone")

    with pytest.raises(HostError, match="host 1 is gone"):
        wait_for_arrays([Never()], check)


def test_headers_are_unpacked_as_they_were_packed(tmp_path: Path) -> None:
    opened = open_checkpoint(Source(neox.write(tmp_path)))
    headers, commit = unpack(pack(opened))
    assert headers.index == opened.index
    assert (headers.config, headers.generation_config) == (
        opened.config,
        opened.generation_config,
    )
    assert commit is None
    assert unpack(pack(replace(opened, commit="0f" * 20)))[1] == "0f" * 20


def test_copies_may_differ_in_modification_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folders = [neox.write(tmp_path / name) for name in "ab"]
    os.utime(folders[1] / "model.safetensors", (1, 1))
    made = run_on_hosts(
        monkeypatch,
        2,
        lambda hosts: open_on_all_hosts(
            hosts, lambda headers, _: open_checkpoint(Source(folders[hosts.index]), headers=headers)
        ),
    )
    assert made[0].index.records == made[1].index.records
    (stamp,) = made[1].index.files.values()
    assert stamp.version == str(10**9)


def test_every_difference_is_listed() -> None:
    facts = [{"map": "a" * 64, "dtype": "x"}, {"map": "a" * 64, "dtype": "y"}, {"map": "b" * 64}]
    error = disagreement(facts, "load")
    assert error.exit_code == 2
    assert error.found == "; ".join([
        "dtype: y on host 1, x on host 0",
        "dtype: nothing on host 2, x on host 0",
        f"map: {'b' * 12} on host 2, {'a' * 12} on host 0",
    ])  # fmt: skip


def test_facts_depend_on_everything_in_a_plan(tmp_path: Path) -> None:
    mesh = mtj_loader.make_mesh("mp=2")
    neox.write(tmp_path / "a")
    one = plan_facts(mtj_loader.plan(tmp_path / "a", mesh), mesh)
    neox.write(tmp_path / "b")
    assert plan_facts(mtj_loader.plan(tmp_path / "b", mesh), mesh) == one
    neox.write(tmp_path / "c", rotary_pct=0.25)
    other = plan_facts(mtj_loader.plan(tmp_path / "c", mesh, check_finite=True), mesh)
    assert {name for name in one if one[name] != other[name]} == {"config", "check_finite"}


def test_different_weights_in_files_of_equal_size_are_detected(tmp_path: Path) -> None:
    mesh = mtj_loader.make_mesh("mp=2")
    path = neox.write(tmp_path) / "model.safetensors"
    one = plan_facts(mtj_loader.plan(tmp_path, mesh), mesh)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    other = plan_facts(mtj_loader.plan(tmp_path, mesh), mesh)
    assert {n for n in one if one[n] != other[n]} == {"content of model.safetensors"}


def test_a_mesh_without_devices_of_this_host_is_rejected(tmp_path: Path, monkeypatch) -> None:
    plan = mtj_loader.plan(neox.write(tmp_path), mtj_loader.make_mesh("mp=2"))
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with pytest.raises(MeshError, match="no device of this host"):
        mtj_loader.load(plan=plan)


def test_the_private_names_of_jax_exist() -> None:
    """`jax_runtime` and `key_value_store` use them; a new JAX that moves them fails here."""
    state = jax_runtime.distributed.global_state
    assert {"client", "process_id", "num_processes"} <= vars(type(state)).keys() | vars(
        state
    ).keys()
    client = _jax.DistributedRuntimeClient
    for method in (
        "blocking_key_value_get_bytes",
        "key_value_delete",
        "key_value_dir_get_bytes",
        "key_value_set_bytes",
    ):
        assert callable(getattr(client, method)), method
