"""Object storage: exact reads despite faults, version checks, and error messages."""

from __future__ import annotations

import gc
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError

import numpy as np
import pytest

from mtj_loader.errors import CheckpointError, FormatError, StorageError, UsageError
from mtj_loader.storage import hub, urls
from mtj_loader.storage.base import check_unchanged
from mtj_loader.storage.local import LocalStorage
from mtj_loader.storage.object_store import ObjectStorage
from mtj_loader.storage.prefetch import PrefetchReader
from mtj_loader.storage.retry import RetryPolicy
from mtj_loader.storage.urls import UrlOrigin
from tests.support.object_server import Fault, ObjectServer, serve

FAST = RetryPolicy(attempts=4, first_wait_seconds=0.01, max_wait_seconds=0.02, stalled_seconds=0.4)
DATA = np.random.default_rng(0).integers(0, 256, 1_000_000, np.uint8).tobytes()
HEAD_BYTES = 256 << 10


def storage_at(url: str, names: Sequence[str] = ()) -> ObjectStorage:
    return ObjectStorage(UrlOrigin(url, FAST), FAST, names)


@pytest.fixture
def server():
    with serve({"m/a.bin": DATA, "m/empty": b"", "m/sub/b c+d.bin": b"12345678"}) as running:
        yield running


@pytest.fixture
def storage(server):
    with storage_at(f"{server.url}/m") as opened:
        yield opened


def wait_for(condition, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def loops() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mtj_loader objects"]


# ---- reads without faults


def test_reads_are_exact(storage, server):
    assert storage.read("a.bin", 10, 5) == DATA[10:15]
    assert storage.read("a.bin", 300_000, 500_000) == DATA[300_000:800_000]
    assert storage.read("a.bin", len(DATA), 0) == b""
    assert storage.read("sub/b c+d.bin", 2, 3) == b"345"
    buffer = np.zeros(400_000, np.uint8)
    storage.read_into("a.bin", 600_000, buffer)
    storage.read_into("a.bin", 0, buffer[:0])
    assert buffer.tobytes() == DATA[600_000:]
    future = storage.fetch("a.bin", 7, buffer)
    assert future.result() is None
    assert buffer.tobytes() == DATA[7:400_007]
    sent = HEAD_BYTES + 500_000 + 8 + 400_000 + 400_000  # the first bytes are read once
    assert storage.bytes_received == server.bytes_sent.total() == sent


def test_it_prefetches_and_checks_versions_and_a_folder_does_not(storage, tmp_path):
    local = LocalStorage(tmp_path)
    assert (storage.costs.high_latency, local.costs.high_latency) == (True, False)
    assert (storage.checks_versions, local.checks_versions) == (True, False)
    assert isinstance(storage.reader([], 1 << 20), PrefetchReader)


def test_prepare_returns_versions_and_caches_the_first_bytes(storage, server):
    there = storage.prepare(["a.bin", "nothing", "empty", "a.bin"])
    assert {name: version.size_bytes for name, version in there.items()} == {
        "a.bin": 10**6,
        "empty": 0,
    }
    asked = len(server.requests)
    assert storage.exists("a.bin")
    assert not storage.exists("nothing")
    assert storage.read("a.bin", 100, 1000) == DATA[100:1100]
    assert storage.read("empty", 0, 0) == b""
    assert len(server.requests) == asked
    assert storage.version("a.bin") == there["a.bin"]
    assert server.requests[-1].method == "HEAD"


def test_an_empty_object_without_a_satisfiable_range(storage, server):
    server.always["m/empty"] = Fault(status=416)
    assert storage.prepare(["empty"])["empty"].size_bytes == 0
    server.always["m/a.bin"] = Fault(status=416)
    with pytest.raises(StorageError, match="HTTP 416"):
        storage.prepare(["a.bin"])


def test_many_requests_in_parallel(server):
    server.objects = {f"m/{i}": DATA for i in range(100)}
    server.latency_seconds = 0.05
    with storage_at(f"{server.url}/m") as storage:
        versions = list(storage.prepare(map(str, range(100))).values())
        assert 16 <= server.most_active <= 32
        check_unchanged(storage, *versions)
        server.objects["m/70"] = DATA[::-1]
        with pytest.raises(CheckpointError, match="changed after its header was read"):
            check_unchanged(storage, *versions)


def test_a_large_read_is_split_into_requests(server, monkeypatch):
    monkeypatch.setattr("mtj_loader.storage.object_store._RANGE_BYTES", 300_000)
    with storage_at(f"{server.url}/m") as storage:
        assert storage.read("a.bin", 1, 999_999) == DATA[1:]
    ranges = sorted((r.start, r.stop) for r in server.gets("m/a.bin"))
    assert ranges[1:] == [(1, 300_001), (300_001, 600_001), (600_001, 900_001), (900_001, 10**6)]


def test_names_without_a_listing(server):
    server.objects |= {"m/config.json": b"{}", "m/merges.txt": b""}
    with storage_at(f"{server.url}/m", ["merges.txt", "none", "config.json"]) as storage:
        assert storage.names() == ["config.json", "merges.txt"]


def test_without_etags(server):
    server.etags = False
    with storage_at(f"{server.url}/m") as storage:
        assert storage.read("a.bin", 400_000, 9) == DATA[400_000:400_009]
        assert storage.version("a.bin").version.startswith("2023-11-14")
        server.objects["m/a.bin"] += b"x"
        with pytest.raises(CheckpointError, match="changed") as caught:
            storage.read("a.bin", 400_000, 9)
    assert "expected: 1,000,000 bytes" in str(caught.value)
    assert "found: 1,000,001 bytes" in str(caught.value)


def test_a_traceback_shows_no_password(server):
    server.always["m/a.bin"] = Fault(status=403)
    url = server.url.replace("://", "://me:hunter2@")
    with storage_at(f"{url}/m?sig=abcdef") as storage, pytest.raises(StorageError) as caught:
        storage.read("a.bin", 400_000, 9)
    shown = "".join(traceback.format_exception(caught.value))
    assert "403" in shown
    assert not any(secret in shown for secret in ("hunter2", "abcdef"))


def test_a_server_without_versions_is_rejected(server):
    server.etags = server.dates = False
    with (
        storage_at(f"{server.url}/m") as storage,
        pytest.raises(StorageError, match="neither an etag nor a modification time"),
    ):
        storage.read("a.bin", 0, 9)


def test_a_storage_is_closed_by_its_last_user(server):
    with storage_at(f"{server.url}/m") as storage:
        with storage:
            assert storage.read("a.bin", 400_000, 9) == DATA[400_000:400_009]
        assert len(loops()) == 1
    assert not loops()


def test_closing_ends_threads_and_connections(server):
    storage = storage_at(f"{server.url}/m")
    assert not loops()
    storage.prepare(["a.bin", "empty"])
    assert len(loops()) == 1
    assert server.connections > 0
    storage.close()
    assert not loops()
    assert wait_for(lambda: server.connections == 0)
    assert storage.read("a.bin", 500_000, 3) == DATA[500_000:500_003]  # reopened
    storage.close()
    storage.close()
    assert not loops()


def test_closing_cancels_requests(server):
    server.always["m/a.bin"] = Fault(after_bytes=10, stall=True)
    slow = RetryPolicy(stalled_seconds=60)
    storage = ObjectStorage(UrlOrigin(f"{server.url}/m", slow), slow)
    buffer = np.zeros(100, np.uint8)
    futures = [storage.fetch("a.bin", i, buffer) for i in range(40)]
    assert wait_for(lambda: server.connections == 32)
    storage.close()
    for future in futures:
        with pytest.raises(CancelledError):  # a timeout would be another error
            future.result(timeout=1)
    assert not loops()
    assert wait_for(lambda: server.connections == 0)


@pytest.mark.parametrize("fault", [Fault(status=403), Fault(etag='"new"')], ids=["403", "etag"])
def test_a_kept_error_holds_no_connection(server, fault):
    storage = storage_at(f"{server.url}/m")
    storage.prepare(["a.bin"])
    server.always["m/a.bin"] = fault
    try:
        storage.read("a.bin", 300_000, 600_000)
    except (CheckpointError, StorageError) as error:
        kept = error
    storage.close()

    def closed() -> bool:
        gc.collect()  # a reference cycle of the finished task may still hold it (Python 3.12)
        return server.connections == 0

    assert wait_for(closed)
    assert kept.file == f"{server.url}/m/a.bin"


# ---- transient faults


TRANSIENT = {
    "429": Fault(status=429),
    "429 with Retry-After": Fault(status=429, headers={"Retry-After": "1"}),
    "408": Fault(status=408),
    "500": Fault(status=500),
    "503": Fault(status=503),
    "reset at once": Fault(after_bytes=0, reset=True),
    "reset in the body": Fault(after_bytes=100_000, reset=True),
    "short body": Fault(after_bytes=100_000),
    "stalled body": Fault(after_bytes=100_000, stall=True),
}


@pytest.mark.parametrize("fault", TRANSIENT.values(), ids=TRANSIENT)
def test_transient_faults_are_retried(storage, server, fault):
    storage.prepare(["a.bin"])
    server.requests.clear()
    server.faults["m/a.bin"] = deque([fault, fault])
    assert storage.read("a.bin", 300_000, 600_000) == DATA[300_000:900_000]
    starts = [request.start for request in server.gets("m/a.bin")]
    assert len(starts) == 3
    got = fault.after_bytes or 0
    assert starts[0] == 300_000
    # Bytes received before a body broke off are kept.
    assert starts[0] <= starts[1] <= 300_000 + got
    assert starts[1] <= starts[2] <= 300_000 + 2 * got


def test_a_body_that_breaks_off_is_resumed(storage, server, monkeypatch):
    monkeypatch.setattr("mtj_loader.storage.object_store._CHUNK_BYTES", 16 << 10)
    storage.prepare(["a.bin"])
    server.faults["m/a.bin"] = deque([Fault(after_bytes=200_000, stall=True)])
    assert storage.read("a.bin", 300_000, 600_000) == DATA[300_000:900_000]
    assert server.gets("m/a.bin")[-1].start > 300_000
    assert storage.bytes_received < HEAD_BYTES + 600_000 + 200_000


@pytest.mark.parametrize("fault", [TRANSIENT["503"], TRANSIENT["short body"]], ids=["503", "short"])
def test_transient_faults_in_the_first_bytes(storage, server, fault):
    server.faults["m/a.bin"] = deque([fault])
    assert storage.read("a.bin", 0, 9) == DATA[:9]


# ---- permanent faults


def failure(storage, kind, start=300_000, length=600_000) -> str:
    with pytest.raises(kind) as caught:
        storage.read("a.bin", start, length)
    assert type(caught.value) is kind
    return f"{caught.value}\n"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(status=429), "HTTP 429 Too Many Requests: the server says no"),
        (Fault(status=500), "HTTP 500 Internal Server Error: the server says no"),
        (Fault(after_bytes=0, reset=True), "body error"),
        (Fault(after_bytes=0), "body error"),
        (Fault(after_bytes=0, stall=True), "no data within the time limit"),
    ],
    ids=["429", "500", "reset", "short", "stall"],
)
def test_the_last_attempt_fails(storage, server, fault, words):
    storage.prepare(["a.bin"])
    server.always["m/a.bin"] = fault
    message = failure(storage, StorageError)
    assert message.startswith("the server keeps failing\n")
    assert f"file: {server.url}/m/a.bin\n  key: bytes 300,000 to 900,000\n" in message
    assert "found: 4 attempts in " in message
    assert words in message
    assert len(server.gets("m/a.bin")) == 1 + 4


def test_no_attempt_starts_after_the_time_limit(server):
    server.always["m/a.bin"] = Fault(status=503)
    short = RetryPolicy(attempts=1000, first_wait_seconds=0.2, total_seconds=0.3)
    with ObjectStorage(UrlOrigin(f"{server.url}/m", short), short) as storage:
        assert attempts_in(failure(storage, StorageError)) <= 4


def attempts_in(message: str) -> int:
    return int(message.partition("found: ")[2].split()[0])


FINAL = {
    "403": (Fault(status=403), StorageError, ["refuses access", "HTTP 403", "credentials"]),
    "401": (Fault(status=401), StorageError, ["refuses access", "HTTP 401", "credentials"]),
    "400": (Fault(status=400), StorageError, ["a request failed", "HTTP 400 Bad Request"]),
    "404": (Fault(status=404), CheckpointError, ["the file is missing", "HTTP 404"]),
    "whole": (Fault(whole=True), StorageError, ["does not support range requests", "copy the"]),
    "etag": (Fault(etag='"new"'), CheckpointError, ["the file changed", 'version "new"']),
}


@pytest.mark.parametrize(("fault", "kind", "words"), FINAL.values(), ids=FINAL)
def test_permanent_faults_are_not_retried(storage, server, fault, kind, words):
    storage.prepare(["a.bin"])
    server.always["m/a.bin"] = fault
    message = failure(storage, kind)
    for word in ("a.bin\n", *words):
        assert word in message
    if fault.status != 404:
        assert "key: bytes 300,000 to 900,000\n" in message
    assert len(server.gets("m/a.bin")) == 2


def test_changed_in_the_middle_of_a_body(storage, server):
    """A resumed body must have the same version."""
    storage.prepare(["a.bin"])
    faults = [Fault(after_bytes=100_000, stall=True), Fault(etag='"new"')]
    server.faults["m/a.bin"] = deque(faults)
    assert "the file changed after its header was read" in failure(storage, CheckpointError)


def test_changed_between_two_openings(storage, server):
    storage.prepare(["a.bin"])
    storage.close()
    server.objects["m/a.bin"] = DATA[::-1]
    assert "the file changed after its header was read" in failure(storage, CheckpointError)
    assert "changed" in failure(storage, CheckpointError, start=0, length=9)


def test_expected_versions_come_from_another_host(storage, server):
    with storage_at(f"{server.url}/m") as other:
        version = other.version("a.bin")
    storage.expect([version])
    assert storage.read("a.bin", 0, 9) == DATA[:9]
    server.objects["m/a.bin"] = DATA[::-1]
    assert "the file changed" in failure(storage, CheckpointError)


def test_read_past_the_end(storage, server):
    for start in (900_000, 10**6, 10**15):
        message = failure(storage, CheckpointError, start, 10**12)
        assert "ends in the middle of a read" in message
        assert f"at byte {start:,}\n" in message
    assert len(server.gets("m/a.bin")) == 1  # no request was sent


def test_missing(storage, server):
    for ask in (lambda: storage.version("no"), lambda: storage.read("no", 0, 1)):
        with pytest.raises(CheckpointError, match="the file is missing") as caught:
            ask()
        assert f"file: {server.url}/m/no" in str(caught.value)


def test_connection_refused():
    with storage_at("http://127.0.0.1:9/m") as storage:
        message = failure(storage, StorageError)
    assert "the server keeps failing" in message
    assert "Connection refused" in message


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a\\b", "x\ny"], ids=ascii)
def test_names_that_could_leave_the_prefix(storage, server, name):
    for ask in (storage.version, storage.exists, lambda n: storage.read(n, 0, 1)):
        with pytest.raises(FormatError, match="not a relative file name"):
            ask(name)
    assert not server.requests


def test_secrets_stay_out_of_messages(server):
    url = server.url.replace("//", "//me:hunter2@") + "/m?sig=abc%2Fdef"
    with storage_at(url) as storage:
        assert storage.read("a.bin", 0, 9) == DATA[:9]
        assert storage.location == f"{server.url}/m"
        server.always["m/a.bin"] = Fault(status=403)
        message = failure(storage, StorageError)
    assert "hunter2" not in message
    assert "abc" not in message


def test_without_obstore(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "obstore"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "mtj_loader.storage.object_store", raising=False)
    monkeypatch.setitem(sys.modules, "obstore", None)
    for ask in (
        lambda: urls.open_url("s3://bucket/model", file_suffix=".safetensors"),
        lambda: hub.open_repository(hub.Repository("org/name"), None),
    ):
        with pytest.raises(UsageError, match="needs the package obstore") as caught:
            ask()
        assert "pip install 'mtj-loader[remote]'" in str(caught.value)


def test_the_server_forgets_a_client_that_left(server: ObjectServer):
    """The tests above rely on this."""
    assert server.connections == 0
