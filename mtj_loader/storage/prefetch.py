"""Reading ahead of the loader from a distant storage: large ranges, many at once, bounded memory.

The loader reads small pieces by a few threads, in an order that is known beforehand. Here that
order becomes requests, which are under way long before their bytes are wanted.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mtj_loader.errors import StorageError
from mtj_loader.storage.base import RemoteStorage, Storage
from mtj_loader.storage.ranges import Range, Run, merged

_SHARE = 2  # of host_memory one part in two is for reading ahead: the network is the wall
_RANGES_HELD = 64  # while some wait to be used, 32 others are still under way
_MIN_RANGE_BYTES = 1 << 20  # below, a request costs more than its bytes
_REQUEST_BYTES = 1 << 20  # a connection's own buffers, and the part of a body on its way to ours


class Reader(Protocol):
    """Where the loader's threads get their bytes."""

    @property
    def extra_bytes(self) -> int:
        """What came over the network beyond what was read: gaps, and bodies that broke off."""
        ...

    def read_into(self, path: str, offset_bytes: int, buffer: np.ndarray) -> None:
        """Fills a contiguous uint8 buffer, as `Storage.read_into`."""
        ...

    def stop(self) -> None:
        """Ends what is under way; threads that wait get an error."""
        ...


def ahead_bytes(storage: Storage, host_memory_bytes: int) -> int:
    """How much of the budget reading ahead takes: none for what is near."""
    return host_memory_bytes // _SHARE if isinstance(storage, RemoteStorage) else 0


def range_bytes(storage: RemoteStorage, budget_bytes: int) -> int:
    """The longest range that is asked for at once."""
    return min(max(budget_bytes // _RANGES_HELD, _MIN_RANGE_BYTES), storage.ideal_range_bytes)


def reader_for(storage: Storage, runs: Iterable[Run], budget_bytes: int) -> Reader:
    """The reader for a storage; `runs` are all that will be read, in order."""
    if isinstance(storage, RemoteStorage):
        return ReadAhead(storage, runs, budget_bytes)
    return Direct(storage)


@dataclass(frozen=True)
class Direct:
    """Local files are read when they are wanted: the system reads ahead by itself."""

    storage: Storage
    extra_bytes: int = 0

    def read_into(self, path: str, offset_bytes: int, buffer: np.ndarray) -> None:
        """See `Reader.read_into`."""
        self.storage.read_into(path, offset_bytes, buffer)

    def stop(self) -> None:
        """Nothing is under way."""


@dataclass(eq=False)
class _Fetch:
    """A range on its way or arrived; `left_bytes` of it have not been used yet."""

    range: Range
    left_bytes: int
    buffer: np.ndarray | None = None
    future: Future[None] | None = None

    @property
    def cost_bytes(self) -> int:
        return self.range.stop - self.range.start + _REQUEST_BYTES


class ReadAhead:
    """Keeps as many ranges under way as the budget holds, and serves reads from them.

    A range's memory is free once all that is needed of it was read. Reads must be among `runs` and
    begin in about their order: the first one not yet done always finds its range among those held.

    Args:
      storage: what is read.
      runs: every read that will come.
      budget_bytes: for all ranges together, on their way and arrived.
    """

    def __init__(self, storage: RemoteStorage, runs: Iterable[Run], budget_bytes: int) -> None:
        self._storage, self._budget = storage, budget_bytes
        self._ranges = merged(runs, range_bytes(storage, budget_bytes))
        self._received_before = storage.bytes_received
        self.extra_bytes = self._served_bytes = self._held_bytes = 0
        self._room = threading.Condition()  # its lock guards all that follows
        self._parts: dict[Run, deque[tuple[_Fetch, int]]] = {}
        self._queued: deque[_Fetch] = deque()
        self._held: list[_Fetch] = []
        self._error: Exception | None = None

    def read_into(self, path: str, offset_bytes: int, buffer: np.ndarray) -> None:
        """See `Reader.read_into`; raises the first error of any range, whichever is read."""
        start, stop = offset_bytes, offset_bytes + buffer.nbytes
        while start < stop:
            fetch, end = self._claim((path, start, stop))
            data = self._arrived(fetch)
            part = data[start - fetch.range.start : end - fetch.range.start]
            buffer[start - offset_bytes : end - offset_bytes] = part
            self._used(fetch, end - start)
            start = end

    def stop(self) -> None:
        """See `Reader.stop`; from here on `extra_bytes` is known."""
        received_bytes = self._storage.bytes_received - self._received_before
        self.extra_bytes = received_bytes - self._served_bytes
        self._fail(StorageError("reading was stopped"))

    def _claim(self, key: Run) -> tuple[_Fetch, int]:
        """The range that a run begins in, once it is under way, and how far it goes there."""
        with self._room:
            self._check()
            while key not in self._parts and self._announce():
                pass
            assert key in self._parts, f"a read that was not announced: {key}"
            waiting = self._parts[key]
            fetch, end = waiting.popleft()
            if not waiting:
                del self._parts[key]
            self._send()
            self._room.wait_for(lambda: fetch.future is not None or self._error)
            self._check()
            return fetch, end

    def _arrived(self, fetch: _Fetch) -> np.ndarray:
        """The range's bytes, waited for without the lock."""
        if (future := fetch.future) is not None:
            try:
                future.result()
            except CancelledError as cancelled:  # by `_fail`, or somebody closed the storage
                self._check()
                raise StorageError("reading was stopped", file=fetch.range.file) from cancelled
            del future  # an error's frames must not keep its connection
        self._check()
        assert fetch.buffer is not None
        return fetch.buffer

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _used(self, fetch: _Fetch, size_bytes: int) -> None:
        with self._room:
            self._check()
            self._served_bytes += size_bytes
            fetch.left_bytes -= size_bytes
            if fetch.left_bytes == 0:
                self._held.remove(fetch)
                self._held_bytes -= fetch.cost_bytes
                fetch.buffer = None
            self._send()

    def _announce(self) -> bool:
        """Takes note of one more range; says whether there was one."""
        following = next(self._ranges, None)
        if following is None:
            return False
        fetch = _Fetch(following, following.needed_bytes)
        self._queued.append(fetch)
        for start, end, stop in following.parts:
            key = (following.file, start, stop)
            self._parts.setdefault(key, deque()).append((fetch, end))
        return True

    def _send(self) -> None:
        """Sends requests for the next ranges, as far as there is room."""
        while self._error is None and (self._queued or self._announce()):
            cost_bytes = self._queued[0].cost_bytes
            if self._held and self._held_bytes + cost_bytes > self._budget:
                return
            fetch = self._queued.popleft()
            self._held.append(fetch)
            self._held_bytes += cost_bytes
            span = fetch.range
            fetch.buffer = np.empty(span.stop - span.start, np.uint8)
            fetch.future = self._storage.fetch(span.file, span.start, fetch.buffer)
            fetch.future.add_done_callback(self._notice)
            self._room.notify_all()

    def _notice(self, future: Future[None]) -> None:
        """An error stops everything at once, not only when its range is wanted."""
        if not future.cancelled() and isinstance(error := future.exception(), Exception):
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        with self._room:
            self._error = self._error or error
            futures = [fetch.future for fetch in self._held if fetch.future is not None]
            for fetch in self._held:
                fetch.future = None
            self._held.clear()
            self._queued.clear()
            self._parts.clear()
            self._room.notify_all()
        for future in futures:
            future.cancel()
