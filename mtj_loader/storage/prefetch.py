"""Prefetching from a remote storage: many large range requests at once, in bounded memory.

The loader's threads read small runs of bytes in a known order. That order is turned into range
requests that are sent long before their bytes are needed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mtj_loader.errors import StorageError
from mtj_loader.storage.base import ByteRange, ReadCosts, Storage

_SHARE = 2  # 1/2 of host_memory is for prefetching, because the network is the bottleneck
_REQUESTS_HELD = 64  # 32 are in flight while the others wait to be used
_MIN_RANGE_BYTES = 1 << 20  # a shorter request costs more than its bytes
_OVERHEAD_BYTES = 1 << 20  # of a request: the connection's buffers, and data not yet copied
_MAX_GAP = 50  # at most 1/50 (2%) of a request's needed bytes may be gaps between runs


class RangeSource(Protocol):
    """What prefetching needs from a storage."""

    costs: ReadCosts
    bytes_received: int  # of all response bodies so far

    def fetch(self, path: str, offset_bytes: int, buffer: np.ndarray) -> Future[None]:
        """Starts to fill a buffer (uint8) by one request; cancelling the future ends it."""
        ...


def prefetch_bytes(storage: Storage, host_memory_bytes: int) -> int:
    """How much of the memory budget prefetching takes: none for a storage with low latency."""
    return host_memory_bytes // _SHARE if storage.costs.high_latency else 0


def range_bytes(storage: Storage | RangeSource, budget_bytes: int) -> int:
    """The longest range to request at once."""
    return min(max(budget_bytes // _REQUESTS_HELD, _MIN_RANGE_BYTES), storage.costs.range_bytes)


# ---- which requests


@dataclass(frozen=True)
class Request:
    """A range request for bytes [start, stop) of a file.

    Attributes:
      file, start, stop: see `ByteRange`.
      parts: the needed bytes in it: first byte, byte after the last, and where the range ends.
    """

    file: str
    start: int
    stop: int
    parts: tuple[tuple[int, int, int], ...]

    @property
    def needed_bytes(self) -> int:
        """Its length without the gaps."""
        return sum(stop - start for start, stop, _ in self.parts)


def make_requests(ranges: Iterable[ByteRange], max_bytes: int) -> Iterator[Request]:
    """Joins adjacent ranges of a file into requests, and splits long ones.

    Ranges keep their order. Small gaps are read too, see `_MAX_GAP`.

    Args:
      ranges: in the order of their use.
      max_bytes: of a request.
    """
    builder = None
    for file, first, stop in ranges:
        start = first
        while start < stop:
            if builder is None or not builder.accepts(file, start, stop):
                if builder is not None:
                    yield builder.build()
                builder = _RequestBuilder(file, start, start + max_bytes)
            start = builder.add(start, stop)
    if builder is not None:
        yield builder.build()


@dataclass
class _RequestBuilder:
    """A request under construction; it may not extend beyond `limit`."""

    file: str
    start: int
    limit: int
    needed_bytes: int = 0
    parts: list[tuple[int, int, int]] = field(default_factory=list)

    def accepts(self, file: str, start: int, stop: int) -> bool:
        """Whether it can continue with a range: same file, forward, not too long, small gap."""
        end = min(stop, self.limit)
        if file != self.file or start < self.parts[-1][1] or start >= end:
            return False
        needed = self.needed_bytes + end - start
        return (end - self.start - needed) * _MAX_GAP <= needed

    def add(self, start: int, stop: int) -> int:
        """Adds as much of a range as fits, and returns where that part ends."""
        end = min(stop, self.limit)
        self.parts.append((start, end, stop))
        self.needed_bytes += end - start
        return end

    def build(self) -> Request:
        return Request(self.file, self.start, self.parts[-1][1], tuple(self.parts))


# ---- sending them


@dataclass(eq=False)
class _Fetch:
    """A request in flight or answered; `left_bytes` of it have not been used yet."""

    request: Request
    left_bytes: int
    buffer: np.ndarray | None = None
    future: Future[None] | None = None

    @property
    def cost_bytes(self) -> int:
        return self.request.stop - self.request.start + _OVERHEAD_BYTES


class PrefetchReader:
    """Keeps as many requests in flight as the budget allows, and serves reads from them.

    A request's memory is freed when all needed bytes of it were read. Every read must be one of
    `ranges`, in roughly their order: the first range not yet read always belongs to a held request.

    Args:
      storage: what is read.
      ranges: every read that will come.
      budget_bytes: for all requests together, in flight and answered.
    """

    def __init__(
        self, storage: RangeSource, ranges: Iterable[ByteRange], budget_bytes: int
    ) -> None:
        self._storage, self._budget = storage, budget_bytes
        self._requests = make_requests(ranges, range_bytes(storage, budget_bytes))
        self._received_before = storage.bytes_received
        self.extra_bytes = self._served_bytes = self._held_bytes = 0
        self._changed = threading.Condition()  # its lock guards everything below
        self._parts: dict[ByteRange, deque[tuple[_Fetch, int]]] = {}
        self._queued: deque[_Fetch] = deque()
        self._held: list[_Fetch] = []
        self._error: Exception | None = None

    def read_into(self, path: str, offset_bytes: int, buffer: np.ndarray) -> None:
        """See `Reader.read_into`; raises the first error of any request, whichever is read."""
        start, stop = offset_bytes, offset_bytes + buffer.nbytes
        while start < stop:
            fetch, end = self._claim((path, start, stop))
            data = self._wait(fetch)
            first = fetch.request.start
            buffer[start - offset_bytes : end - offset_bytes] = data[start - first : end - first]
            self._release(fetch, end - start)
            start = end

    def stop(self) -> None:
        """See `Reader.stop`; sets `extra_bytes`."""
        received_bytes = self._storage.bytes_received - self._received_before
        self.extra_bytes = received_bytes - self._served_bytes
        self._fail(StorageError("reading was stopped"))

    def _claim(self, key: ByteRange) -> tuple[_Fetch, int]:
        """Waits for the request with a range's first byte to be sent; also where the range ends."""
        with self._changed:
            self._check()
            while key not in self._parts and self._queue_next():
                pass
            assert key in self._parts, f"a read that was not announced: {key}"
            waiting = self._parts[key]
            fetch, end = waiting.popleft()
            if not waiting:
                del self._parts[key]
            self._send()
            self._changed.wait_for(lambda: fetch.future is not None or self._error)
            self._check()
            return fetch, end

    def _wait(self, fetch: _Fetch) -> np.ndarray:
        """Waits for a request's bytes, without the lock."""
        if (future := fetch.future) is not None:
            try:
                future.result()
            except CancelledError as cancelled:  # by `_fail`, or because the storage was closed
                self._check()
                raise StorageError("reading was stopped", file=fetch.request.file) from cancelled
            finally:
                del future  # a kept error's frames must not hold the connection
        self._check()
        assert fetch.buffer is not None
        return fetch.buffer

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _release(self, fetch: _Fetch, size_bytes: int) -> None:
        """Counts bytes as used, and frees the request's memory after the last ones."""
        with self._changed:
            self._check()
            self._served_bytes += size_bytes
            fetch.left_bytes -= size_bytes
            if fetch.left_bytes == 0:
                self._held.remove(fetch)
                self._held_bytes -= fetch.cost_bytes
                fetch.buffer = None
            self._send()

    def _queue_next(self) -> bool:
        """Queues one more request; returns whether there was one."""
        request = next(self._requests, None)
        if request is None:
            return False
        fetch = _Fetch(request, request.needed_bytes)
        self._queued.append(fetch)
        for start, end, stop in request.parts:
            key = (request.file, start, stop)
            self._parts.setdefault(key, deque()).append((fetch, end))
        return True

    def _send(self) -> None:
        """Sends the next requests while the budget allows."""
        while self._error is None and (self._queued or self._queue_next()):
            cost_bytes = self._queued[0].cost_bytes
            if self._held and self._held_bytes + cost_bytes > self._budget:
                return
            fetch = self._queued.popleft()
            self._held.append(fetch)
            self._held_bytes += cost_bytes
            request = fetch.request
            fetch.buffer = np.empty(request.stop - request.start, np.uint8)
            fetch.future = self._storage.fetch(request.file, request.start, fetch.buffer)
            fetch.future.add_done_callback(self._on_done)
            self._changed.notify_all()

    def _on_done(self, future: Future[None]) -> None:
        """Stops everything on an error, even if that request's bytes are needed much later."""
        if not future.cancelled() and isinstance(error := future.exception(), Exception):
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = self._error or error
            futures = [fetch.future for fetch in self._held if fetch.future is not None]
            for fetch in self._held:
                fetch.future = None
            self._held.clear()
            self._queued.clear()
            self._parts.clear()
            self._changed.notify_all()
        for future in futures:
            future.cancel()
