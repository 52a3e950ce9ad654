"""The objects of a store, read by range requests, many at once, through obstore.

All requests run in one event loop, so that they can be cancelled together and immediately.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import obstore
from obstore.exceptions import BaseError, NotSupportedError, PermissionDeniedError

from mtj_loader.errors import CheckpointError, FormatError, MtjLoaderError, StorageError
from mtj_loader.storage.base import (
    ByteRange,
    FileVersion,
    ReadCosts,
    Storage,
    as_bytes,
    changed_error,
    is_relative_name,
    truncated_error,
)
from mtj_loader.storage.event_loop import LoopThread, gather
from mtj_loader.storage.prefetch import PrefetchReader
from mtj_loader.storage.retry import RetryPolicy, TransientError, retry
from mtj_loader.storage.server_errors import status_of, translate

if TYPE_CHECKING:
    import numpy as np
    from obstore import GetOptions, GetResult, ObjectMeta
    from obstore.store import ObjectStore

    Located = tuple[ObjectStore, str]  # a store, and the object's key in it

T = TypeVar("T")

# A store starts to answer after 20 to 100 ms and then sends 50 to 100 MB/s on one connection:
# shorter ranges spend their time waiting, longer ones only take memory.
_RANGE_BYTES = 16 << 20
_MAX_REQUESTS = 32  # in flight; fill a 10 Gbit/s link at that rate
# 0.7 GB/s is the most reported from Google Cloud Storage on one TPU VM; S3's first byte comes
# after 100 to 200 ms ("Best practices design patterns", Amazon S3).
OBJECT_STORE = ReadCosts(0.7e9, _MAX_REQUESTS / 0.1, range_bytes=_RANGE_BYTES, high_latency=True)
_HEAD_BYTES = 256 << 10  # contains the header of nearly every shard, and takes 5 ms at that rate
_RANGE_NOT_SATISFIABLE = 416  # the HTTP status of some servers for any range of an empty object
_CHUNK_BYTES = 256 << 10  # of a body copied at a time, and so the most lost when it breaks off


class Origin(Protocol):
    """Finds the objects of one checkpoint. Its coroutines run in the storage's event loop."""

    @property
    def location(self) -> str:
        """For messages; contains no secrets."""
        ...

    async def locate(self, path: str) -> Located:
        """Where a file is."""
        ...

    async def relocate(self, path: str, refused: Located) -> Located:
        """Where a file is now, after `refused` denied access; `refused` itself if unchanged."""
        ...

    async def names(self) -> list[str] | None:
        """The files at the top level; None if the server cannot list them."""
        ...

    def version(self, meta: ObjectMeta) -> str:
        """What identifies an object's content, taken from a response."""
        ...

    def close(self) -> None:
        """Drops the connections."""
        ...


class ObjectStorage(Storage):
    """The objects below one URL, or of one commit of a Hugging Face repository.

    Every response is compared with the first one for its object: another version or size is an
    error. Transient failures are retried, from the byte where the body broke off.

    Args:
      origin: finds the objects.
      policy: for retries.
      fallback_names: the files that `names` looks for if the server cannot list them.
    """

    costs = OBJECT_STORE
    checks_versions = True

    def __init__(
        self, origin: Origin, policy: RetryPolicy, fallback_names: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.location = origin.location
        self.bytes_received = 0
        self._origin, self._policy, self._fallback_names = origin, policy, fallback_names
        self._thread = LoopThread()
        self._slots: asyncio.Semaphore | None = None
        self._versions: dict[str, FileVersion] = {}
        self._heads: dict[str, bytes | None] = {}  # first bytes; None: no such object
        self._names: list[str] | None = None

    def names(self) -> list[str]:
        """The files at the top level, sorted; see `fallback_names`.

        Raises:
          CheckpointError: the bucket does not exist.
          StorageError: the server failed or denied access.
        """
        if self._names is None:
            self._names = self._thread.run(self._list())
        if self._names is None:
            self._names = list(self.prepare(self._fallback_names))
        return sorted(self._names)

    def exists(self, path: str) -> bool:
        """Whether the object exists; the answer is kept until `close`."""
        return path in self.prepare([path])

    def version(self, path: str) -> FileVersion:
        """The object's current size and version.

        Raises:
          CheckpointError: the object does not exist.
          StorageError: the server failed or denied access.
        """
        return self.versions([path])[0]

    def versions(self, paths: Sequence[str]) -> list[FileVersion]:
        """Like `version`, for many objects in parallel."""
        return self._thread.run(gather(map(self._query_version, paths)))

    def prepare(self, paths: Iterable[str]) -> dict[str, FileVersion]:
        """Fetches the first bytes of several objects in parallel and keeps them until `close`.

        Returns:
          The versions of those that exist, as in the first response for each.
        """
        paths = list(dict.fromkeys(paths))
        new = [path for path in paths if path not in self._heads]
        if new:
            self._thread.run(gather(map(self._fetch_head, new)))
        return {path: self._versions[path] for path in paths if self._heads[path] is not None}

    def expect(self, versions: Iterable[FileVersion]) -> None:
        """Makes every later read check for these versions, which another host found."""
        self._versions.update((version.path, version) for version in versions)

    def read(self, path: str, offset_bytes: int, length_bytes: int) -> bytes:
        """Reads exactly this many bytes.

        Raises:
          CheckpointError: the object is missing, too short, or changed.
          StorageError: the server failed or denied access.
        """
        stop = offset_bytes + length_bytes
        self._check_bounds(path, offset_bytes, stop)
        head = self._heads.get(path) or b""
        if stop <= len(head):
            return head[offset_bytes:stop]
        buffer = bytearray(length_bytes)
        self.read_into(path, offset_bytes, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, path: str, offset_bytes: int, buffer: memoryview | np.ndarray) -> None:
        """Fills all of a writable, contiguous buffer of bytes; large ones by several requests.

        Raises:
          CheckpointError: the object is missing, too short, or changed.
          StorageError: the server failed or denied access.
        """
        if not (view := as_bytes(buffer)):
            return
        self._check_bounds(path, offset_bytes, offset_bytes + len(view))
        starts = range(0, len(view), _RANGE_BYTES)
        parts = ((offset_bytes + i, view[i : i + _RANGE_BYTES]) for i in starts)
        self._thread.run(gather(self._fill(path, start, part) for start, part in parts))

    def fetch(self, path: str, offset_bytes: int, buffer: np.ndarray) -> Future[None]:
        """Starts to fill a buffer (uint8) by one request; raises like `read_into`."""
        return self._thread.submit(self._fill(path, offset_bytes, buffer.data))

    def reader(self, ranges: Iterable[ByteRange], budget_bytes: int) -> PrefetchReader:
        """A reader that prefetches; see `Storage.reader`."""
        return PrefetchReader(self, ranges, budget_bytes)

    def close(self) -> None:
        """Cancels every request and closes every connection; a later read reconnects."""
        self._thread.close()
        self._origin.close()
        self._slots, self._names = None, None
        self._heads.clear()

    def _check_bounds(self, path: str, start: int, stop: int) -> None:
        if path not in self._versions and path not in self.prepare([path]):
            raise CheckpointError("the file is missing", file=self._full_name(path))
        size_bytes = self._versions[path].size_bytes
        if stop > size_bytes:
            raise truncated_error(self._full_name(path), start, stop - start, size_bytes - start)

    async def _list(self) -> list[str] | None:
        return await self._retry("", None, self._origin.names)

    async def _query_version(self, path: str) -> FileVersion:
        async def attempt() -> FileVersion:
            return self._version(path, await self._request(path, obstore.head_async))

        return await self._retry(path, None, attempt)

    async def _fetch_head(self, path: str) -> None:
        """Stores the object's first bytes, and its version from the same response."""

        async def attempt() -> bytes:
            response = await self._get(path, 0, _HEAD_BYTES)
            data = bytes(await response.bytes_async())
            if len(data) != response.range[1]:
                raise TransientError("the body ends early")
            self.bytes_received += len(data)
            return data

        try:
            data = await self._retry(path, None, attempt)
        except MtjLoaderError as error:
            data = await self._explain_no_head(path, error)
        self._heads[path] = data

    async def _explain_no_head(self, path: str, error: MtjLoaderError) -> bytes | None:
        """The first bytes of an object after an error: None if it is missing, b"" if empty."""
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError):
            return None
        no_range = isinstance(cause, BaseError) and status_of(cause) == _RANGE_NOT_SATISFIABLE
        if not no_range and not isinstance(cause, NotSupportedError):
            raise error
        version = await self._query_version(path)
        if version.size_bytes:
            raise error
        self._versions[path] = version
        return b""

    async def _fill(self, path: str, start: int, view: memoryview) -> None:
        """Fills a buffer by one request, and by further ones from where a body breaks off."""
        done, stop = 0, start + len(view)

        async def attempt() -> None:
            nonlocal done
            async for chunk in (await self._get(path, start + done, stop)).stream(_CHUNK_BYTES):
                view[done : done + len(chunk)] = chunk
                done += len(chunk)
                self.bytes_received += len(chunk)
            if done < len(view):
                raise TransientError(f"the body ends {len(view) - done:,} bytes early")

        await self._retry(path, f"bytes {start:,} to {stop:,}", attempt)

    async def _get(self, path: str, start: int, stop: int) -> GetResult:
        """The response to a range request, after a check of the object's version."""
        options: GetOptions = {"range": (start, stop)}

        async def send(store: ObjectStore, key: str) -> GetResult:
            return await obstore.get_async(store, key, options=options)

        response = await self._request(path, send)
        version = self._version(path, response.meta)
        first = self._versions.setdefault(path, version)
        if version != first:
            first = replace(first, path=self._full_name(path))
            raise changed_error(first, version, key=f"bytes {start:,} to {stop:,}")
        return response

    async def _request(self, path: str, send: Callable[[ObjectStore, str], Awaitable[T]]) -> T:
        """Sends a request to the object's store; if access is denied, again to its new place."""
        located = await self._origin.locate(path)
        try:
            return await send(*located)
        except PermissionDeniedError:
            now = await self._origin.relocate(path, located)
            if now is located:
                raise
            return await send(*now)

    async def _retry(self, path: str, key: str | None, attempt: Callable[[], Awaitable[T]]) -> T:
        """An attempt's result, after as many retries as the policy allows, or our error."""
        if path and not is_relative_name(path):
            raise FormatError("not a relative file name", file=ascii(path))
        self._slots = self._slots or asyncio.Semaphore(_MAX_REQUESTS)
        file = self._full_name(path)

        def explain(found: str) -> StorageError:
            return StorageError("the server keeps failing", file=file, key=key, found=found)

        async def translated() -> T:
            try:
                return await attempt()
            except (MtjLoaderError, TransientError, BaseError, FileNotFoundError) as error:
                ours = translate(error, file, key)
            raise ours  # outside of `except`, which would set the original as its context

        async with self._slots:
            return await retry(translated, self._policy, explain)

    def _version(self, path: str, meta: ObjectMeta) -> FileVersion:
        return FileVersion(path, meta["size"], self._origin.version(meta))

    def _full_name(self, path: str) -> str:
        return f"{self.location}/{path}" if path else self.location
