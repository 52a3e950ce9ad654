"""Prefetching: how runs become requests, and how much memory they take."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtj_loader.errors import StorageError
from mtj_loader.storage.base import ReadCosts
from mtj_loader.storage.local import LocalStorage
from mtj_loader.storage.prefetch import PrefetchReader, Request, make_requests, prefetch_bytes

MIB = 1 << 20


def spans(runs, max_bytes):
    return [(r.file, r.start, r.stop) for r in make_requests(runs, max_bytes)]


# ---- which requests


@pytest.mark.parametrize(
    ("runs", "ranges"),
    [
        ([], []),
        ([("a", 5, 5)], []),
        ([("a", 0, 10), ("a", 10, 20)], [("a", 0, 20)]),
        ([("a", 0, 100), ("a", 102, 200)], [("a", 0, 200)]),  # 2 bytes of 198: about 1 %
        ([("a", 0, 100), ("a", 105, 200)], [("a", 0, 100), ("a", 105, 200)]),  # 5 %
        ([("a", 0, 50), ("a", 51, 100), ("a", 102, 140)], [("a", 0, 100), ("a", 102, 140)]),
        ([("a", 0, 10), ("b", 10, 20)], [("a", 0, 10), ("b", 10, 20)]),
        ([("a", 50, 60), ("a", 0, 50)], [("a", 50, 60), ("a", 0, 50)]),  # backward
        ([("a", 0, 60), ("a", 40, 80)], [("a", 0, 60), ("a", 40, 80)]),  # bytes needed twice
        ([("a", 0, 450)], [("a", 0, 200), ("a", 200, 400), ("a", 400, 450)]),
        ([("a", 0, 150), ("a", 150, 250)], [("a", 0, 200), ("a", 200, 250)]),
    ],
)
def test_ranges(runs, ranges):
    assert spans(runs, 200) == ranges


def test_parts_record_where_their_runs_end():
    ranges = list(make_requests([("a", 0, 150), ("a", 152, 250)], 200))
    assert ranges == [
        Request("a", 0, 200, ((0, 150, 150), (152, 200, 250))),
        Request("a", 200, 250, ((200, 250, 250),)),
    ]
    assert ranges[0].needed_bytes == 198


runs_of_files = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(0, 500), st.integers(0, 120)).map(
        lambda run: (run[0], run[1], run[1] + run[2])
    ),
    max_size=40,
)


@given(runs_of_files, st.integers(1, 300))
def test_ranges_cover_the_runs_in_order_with_little_waste(runs, max_bytes):
    ranges = list(make_requests(runs, max_bytes))
    wanted = [(file, i) for file, start, stop in runs for i in range(start, stop)]
    parts = [(r.file, a, b) for r in ranges for a, b, _ in r.parts]
    assert [(file, i) for file, a, b in parts for i in range(a, b)] == wanted
    for r in ranges:
        assert r.stop - r.start <= max_bytes
        assert (r.start, r.stop) == (r.parts[0][0], r.parts[-1][1])
        assert (r.stop - r.start - r.needed_bytes) * 50 <= r.needed_bytes


# ---- sending them


class FakeStore:
    """A remote storage that answers requests when a test tells it to."""

    location = "fake"
    costs = ReadCosts(1e9, 1e3, range_bytes=MIB, high_latency=True)

    def __init__(self, size: int, *, at_once: bool = False) -> None:
        self.data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
        self.at_once = at_once
        self.bytes_received = 0
        self.asked: list[tuple[int, np.ndarray, Future[None]]] = []
        self.most_open_bytes = 0

    def fetch(self, path, offset_bytes, buffer):
        future: Future[None] = Future()
        self.asked.append((offset_bytes, buffer, future))
        if self.at_once:
            self.answer(len(self.asked) - 1)
        return future

    def answer(self, number):
        offset, buffer, future = self.asked[number]
        buffer[:] = self.data[offset : offset + buffer.size]
        self.bytes_received += buffer.size
        future.set_result(None)

    def unused(self, *_):
        raise NotImplementedError

    names = exists = version = versions = prepare = read = read_into = close = unused
    __enter__ = __exit__ = unused


def whole(size, step=MIB // 4):
    return [("f", i, min(i + step, size)) for i in range(0, size, step)]


def test_only_a_remote_storage_prefetches(tmp_path):
    (tmp_path / "f").write_bytes(b"12345678")
    local, far = LocalStorage(tmp_path), FakeStore(8)
    assert prefetch_bytes(local, 64 * MIB) == 0
    assert prefetch_bytes(far, 64 * MIB) == 32 * MIB
    with local:
        reader = local.reader([], 0)
        buffer = np.zeros(3, np.uint8)
        reader.read_into("f", 2, buffer)
        reader.stop()
    assert reader is local
    assert buffer.tobytes() == b"345"
    assert reader.extra_bytes == 0


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("budget", [MIB, 6 * MIB, 64 * MIB])
def test_every_byte_is_read_once_with_any_number_of_threads(threads, budget):
    store = FakeStore(10 * MIB + 77, at_once=True)
    runs = whole(store.data.size)
    reader = PrefetchReader(store, iter(runs), budget)
    found = np.zeros_like(store.data)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda run: reader.read_into("f", run[1], found[run[1] : run[2]]), runs))
    reader.stop()
    assert np.array_equal(found, store.data)
    assert store.bytes_received == store.data.size
    assert reader.extra_bytes == 0
    assert [offset for offset, *_ in store.asked] == list(range(0, store.data.size, MIB))


def test_the_budget_bounds_what_is_held():
    store = FakeStore(10 * MIB)
    reader = PrefetchReader(store, whole(10 * MIB), 6 * MIB)  # each has 1 MiB of overhead
    buffer = np.zeros(MIB // 4, np.uint8)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(reader.read_into, "f", 0, buffer)
        wait_for(lambda: len(store.asked) == 3)
        store.answer(0)
        first.result(timeout=5)
        assert len(store.asked) == 3  # three quarters of the first range are still needed
        for i in (1, 2, 3):
            reader.read_into("f", i * MIB // 4, buffer)
        assert len(store.asked) == 4
        reader.stop()
    assert all(future.done() for *_, future in store.asked)


def test_the_overhead_of_requests_bounds_tiny_runs():
    store = FakeStore(4 * MIB, at_once=True)
    runs = [("f", i, i + 10) for i in range(0, 4 * MIB, 1000)]  # far apart, so one request each
    reader = PrefetchReader(store, runs, 64 * MIB)
    buffer = np.zeros(10, np.uint8)
    reader.read_into("f", 0, buffer)
    assert len(store.asked) == 63 + 1  # the first one was used and freed
    for _, start, stop in runs[1:]:
        reader.read_into("f", start, buffer)
        assert np.array_equal(buffer, store.data[start:stop])
    assert len(store.asked) == len(runs)


def test_gaps_and_repeated_reads_are_counted():
    store = FakeStore(2000, at_once=True)
    runs = [("f", 0, 500), ("f", 510, 1000), ("f", 0, 500)]
    reader = PrefetchReader(store, runs, MIB)
    for _, start, stop in runs:
        buffer = np.zeros(stop - start, np.uint8)
        reader.read_into("f", start, buffer)
        assert np.array_equal(buffer, store.data[start:stop])
    reader.stop()
    assert reader.extra_bytes == 10
    assert store.bytes_received == 1500


def test_the_same_run_by_two_readers():
    store = FakeStore(1000, at_once=True)
    reader = PrefetchReader(store, [("f", 0, 600), ("f", 0, 600)], MIB)
    buffer = np.zeros(600, np.uint8)
    for _ in range(2):
        reader.read_into("f", 0, buffer)
    assert np.array_equal(buffer, store.data[:600])


def test_a_read_that_was_not_announced():
    reader = PrefetchReader(FakeStore(10), [("f", 0, 5)], MIB)
    with pytest.raises(AssertionError, match="not announced"):
        reader.read_into("f", 1, np.zeros(3, np.uint8))


def test_an_error_far_ahead_stops_every_reader():
    store = FakeStore(10 * MIB)
    reader = PrefetchReader(store, whole(10 * MIB), 10 * MIB)
    with ThreadPoolExecutor(2) as pool:
        reads = [
            pool.submit(reader.read_into, "f", i * MIB, np.zeros(MIB // 4, np.uint8))
            for i in range(2)
        ]
        wait_for(lambda: len(store.asked) == 5)
        store.asked[4][2].set_exception(StorageError("a cable was cut"))
        for read in reads:
            with pytest.raises(StorageError, match="a cable was cut"):
                read.result(timeout=5)
    assert all(future.done() for *_, future in store.asked)
    with pytest.raises(StorageError, match="a cable was cut"):
        reader.read_into("f", MIB // 4, np.zeros(MIB // 4, np.uint8))


def test_stop_wakes_waiting_threads():
    store = FakeStore(10 * MIB)
    reader = PrefetchReader(store, whole(10 * MIB), MIB)
    with ThreadPoolExecutor(2) as pool:
        reads = [  # the budget does not allow the second request
            pool.submit(reader.read_into, "f", i * MIB, np.zeros(MIB // 4, np.uint8))
            for i in range(2)
        ]
        wait_for(lambda: len(store.asked) == 1)
        reader.stop()
        for read in reads:
            with pytest.raises(StorageError, match="reading was stopped"):
                read.result(timeout=5)


def test_a_request_cancelled_elsewhere_is_an_error():
    store = FakeStore(MIB)
    reader = PrefetchReader(store, whole(MIB), 10 * MIB)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(reader.read_into, "f", 0, np.zeros(MIB // 4, np.uint8))
        wait_for(lambda: store.asked)
        store.asked[0][2].cancel()
        with pytest.raises(StorageError, match="reading was stopped"):
            read.result(timeout=5)


def wait_for(condition) -> None:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        threading.Event().wait(0.005)
    assert condition()
