"""A checkpoint's files as objects of a store: read by ranges, many at once, through obstore.

All requests are made in one event loop, so that they can be cancelled together and at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from obstore.exceptions import BaseError, NotSupportedError, PermissionDeniedError

from mtj_loader.errors import CheckpointError, FormatError, MtjLoaderError, StorageError
from mtj_loader.formats.file_names import USUAL_FILES
from mtj_loader.formats.records import FileVersion
from mtj_loader.storage.base import SharedUse, changed, is_relative_name, truncated
from mtj_loader.storage.event_loop import LoopThread
from mtj_loader.storage.origins import Origin
from mtj_loader.storage.retry import (
    RetryPolicy,
    TransientError,
    harmless,
    retry,
    status_of,
    translated,
)

if TYPE_CHECKING:
    import numpy as np
    from obstore import GetOptions, GetResult, ObjectMeta
    from obstore.store import ObjectStore

T = TypeVar("T")

# A store begins to answer after 20 to 100 ms and then sends 50 to 100 MB/s on one connection:
# shorter ranges spend their time waiting, longer ones only take memory.
_RANGE_BYTES = 16 << 20
_REQUESTS_AT_ONCE = 32  # fill a 10 Gbit/s link at that rate
_BEGINNING_BYTES = 256 << 10  # holds the header of nearly every shard, and takes 5 ms at that rate
_NOTHING_IN_RANGE = 416  # the HTTP status of some servers for any range of an empty object
_CHUNK_BYTES = 256 << 10  # of a body handed over at a time: what is lost when it breaks off


class ObjectStorage(SharedUse):
    """The objects below one URL, or of one commit of a Hugging Face repository.

    Every answer is compared with the first one about its object: another version or size is an
    error. Failures that may pass are tried again, from where the body broke off.

    Args:
      origin: finds the objects.
      policy: how long a failing server is borne with.
    """

    ideal_range_bytes = _RANGE_BYTES

    def __init__(self, origin: Origin, policy: RetryPolicy) -> None:
        super().__init__()
        self.location = origin.location
        self.bytes_received = 0
        self._origin, self._policy = origin, policy
        self._thread = LoopThread()
        self._slots: asyncio.Semaphore | None = None
        self._seen: dict[str, FileVersion] = {}
        self._beginnings: dict[str, bytes | None] = {}
        self._names: list[str] | None = None

    def names(self) -> list[str]:
        """The files at the top level, sorted; of a server without listing, the usual ones it has.

        Raises:
          CheckpointError: there is no such bucket.
          StorageError: the server failed or refused.
        """
        if self._names is None:
            self._names = self._thread.run(self._list())
        if self._names is None:
            self._names = list(self.prepare(USUAL_FILES))
        return sorted(self._names)

    def exists(self, path: str) -> bool:
        """Whether there is an object of this name; asks once until `close`."""
        return path in self.prepare([path])

    def stamp(self, path: str) -> FileVersion:
        """The object's size and version as they are now.

        Raises:
          CheckpointError: there is no such object.
          StorageError: the server failed or refused.
        """
        return self.stamps([path])[0]

    def stamps(self, paths: Sequence[str]) -> list[FileVersion]:
        """As `stamp`, of all of them at once."""
        return self._thread.run(_gather(map(self._head, paths)))

    def prepare(self, paths: Iterable[str]) -> dict[str, FileVersion]:
        """Fetches the beginnings of several objects at once and keeps them until `close`.

        Returns:
          The stamps of those that exist, as they were when they were first asked for.
        """
        paths = list(dict.fromkeys(paths))
        new = [path for path in paths if path not in self._beginnings]
        if new:
            self._thread.run(_gather(map(self._begin, new)))
        return {path: self._seen[path] for path in paths if self._beginnings[path] is not None}

    def expect(self, stamps: Iterable[FileVersion]) -> None:
        """From now on these objects must be as another host has seen them."""
        self._seen.update((stamp.path, stamp) for stamp in stamps)

    def read(self, path: str, offset_bytes: int, length_bytes: int) -> bytes:
        """Exactly this many bytes.

        Raises:
          CheckpointError: the object is missing, ends before, or changed.
          StorageError: the server failed or refused.
        """
        stop = offset_bytes + length_bytes
        self._check_inside(path, offset_bytes, stop)
        beginning = self._beginnings.get(path) or b""
        if stop <= len(beginning):
            return beginning[offset_bytes:stop]
        buffer = bytearray(length_bytes)
        self.read_into(path, offset_bytes, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, path: str, offset_bytes: int, buffer: memoryview | np.ndarray) -> None:
        """Fills all of a writable, contiguous buffer of bytes; large ones by several requests.

        Raises:
          CheckpointError: the object is missing, ends before the buffer is full, or changed.
          StorageError: the server failed or refused.
        """
        if buffer.nbytes == 0:  # which cannot be cast
            return
        view = (buffer if isinstance(buffer, memoryview) else buffer.data).cast("B")
        self._check_inside(path, offset_bytes, offset_bytes + len(view))
        starts = range(0, len(view), _RANGE_BYTES)
        parts = ((offset_bytes + i, view[i : i + _RANGE_BYTES]) for i in starts)
        self._thread.run(_gather(self._fill(path, start, part) for start, part in parts))

    def fetch(self, path: str, offset_bytes: int, buffer: np.ndarray) -> Future[None]:
        """Begins to fill a buffer (uint8) by one request; see `read_into` for the errors."""
        return self._thread.submit(self._fill(path, offset_bytes, buffer.data))

    def close(self) -> None:
        """Cancels every request and ends every connection; a later read connects anew."""
        self._thread.close()
        self._origin.close()
        self._slots, self._names = None, None
        self._beginnings.clear()

    def _check_inside(self, path: str, start: int, stop: int) -> None:
        if path not in self._seen and path not in self.prepare([path]):
            raise CheckpointError("the file is missing", file=self._full(path))
        size_bytes = self._seen[path].size_bytes
        if stop > size_bytes:
            raise truncated(self._full(path), start, stop - start, size_bytes - start)

    async def _list(self) -> list[str] | None:
        return await self._tried("", None, self._origin.names)

    async def _head(self, path: str) -> FileVersion:
        async def attempt() -> FileVersion:
            return self._stamp(path, await self._ask(path, obstore.head_async))

        return await self._tried(path, None, attempt)

    async def _begin(self, path: str) -> None:
        """Takes the object's first bytes, and remembers its stamp from the same answer."""

        async def attempt() -> bytes:
            answer = await self._get(path, 0, _BEGINNING_BYTES)
            data = bytes(await answer.bytes_async())
            if len(data) != answer.range[1]:
                raise TransientError("the body ends early")
            self.bytes_received += len(data)
            return data

        try:
            data = await self._tried(path, None, attempt)
        except MtjLoaderError as error:
            data = await self._without_beginning(path, error)
        self._beginnings[path] = data

    async def _without_beginning(self, path: str, error: MtjLoaderError) -> bytes | None:
        """What an object begins with that refused to send it: there is none, or it is empty."""
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError):
            return None
        refused = isinstance(cause, BaseError) and status_of(cause) == _NOTHING_IN_RANGE
        if not refused and not isinstance(cause, NotSupportedError):
            raise error
        stamp = await self._head(path)
        if stamp.size_bytes:
            raise error
        self._seen[path] = stamp
        return b""

    async def _fill(self, path: str, start: int, view: memoryview) -> None:
        """Fills a buffer by one request, and by more from wherever it breaks off."""
        done, stop = 0, start + len(view)

        async def attempt() -> None:
            nonlocal done
            async for chunk in (await self._get(path, start + done, stop)).stream(_CHUNK_BYTES):
                view[done : done + len(chunk)] = chunk
                done += len(chunk)
                self.bytes_received += len(chunk)
            if done < len(view):
                raise TransientError(f"the body ends {len(view) - done:,} bytes early")

        await self._tried(path, f"bytes {start:,} to {stop:,}", attempt)

    async def _get(self, path: str, start: int, stop: int) -> GetResult:
        """The answer to a range request, if it is about the object as it was first seen."""
        options: GetOptions = {"range": (start, stop)}

        async def question(store: ObjectStore, key: str) -> GetResult:
            return await obstore.get_async(store, key, options=options)

        answer = await self._ask(path, question)
        stamp = self._stamp(path, answer.meta)
        seen = self._seen.setdefault(path, stamp)
        if stamp != seen:
            seen = replace(seen, path=self._full(path))
            raise changed(seen, stamp, key=f"bytes {start:,} to {stop:,}")
        return answer

    async def _ask(self, path: str, question: Callable[[ObjectStore, str], Awaitable[T]]) -> T:
        """Puts a question to the object's store; if that refuses, once more at its new place."""
        located = await self._origin.locate(path)
        try:
            return await question(*located)
        except PermissionDeniedError:
            now = await self._origin.relocate(path, located)
            if now is located:
                raise
            return await question(*now)

    async def _tried(self, path: str, key: str | None, attempt: Callable[[], Awaitable[T]]) -> T:
        """An attempt's result, after as many as `policy` allows, or our error."""
        if path and not is_relative_name(path):
            raise FormatError("not a relative file name", file=ascii(path))
        self._slots = self._slots or asyncio.Semaphore(_REQUESTS_AT_ONCE)

        def given_up(found: str) -> StorageError:
            return StorageError("the server keeps failing", file=file, key=key, found=found)

        file = self._full(path)
        async with self._slots:
            try:
                return await retry(attempt, self._policy, given_up)
            except (MtjLoaderError, BaseError, FileNotFoundError) as error:
                final = _explained(error, file, key)
        raise final  # not above, where the original would become its context

    def _stamp(self, path: str, meta: ObjectMeta) -> FileVersion:
        return FileVersion(path, meta["size"], self._origin.version(meta))

    def _full(self, path: str) -> str:
        return f"{self.location}/{path}" if path else self.location


def _explained(error: Exception, file: str, key: str | None) -> MtjLoaderError:
    """Our error for what ended the attempts, which refers to nothing secret and to no answer."""
    if isinstance(error, MtjLoaderError):
        ours, cause = error, error.__cause__
    else:
        ours, cause = translated(error, file, key), error
    ours.__context__ = None
    if cause is not None:
        # The hub's own errors hold whole answers.
        plain = isinstance(cause, BaseError) or type(cause) is FileNotFoundError
        ours.__cause__ = harmless(cause) if plain else None
    return ours.with_traceback(None)


async def _gather(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; the first error cancels the rest."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
