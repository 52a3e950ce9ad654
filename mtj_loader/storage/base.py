"""Where a checkpoint's bytes come from: one small interface, and what all its kinds share."""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

from mtj_loader.errors import CheckpointError
from mtj_loader.formats import strict_json
from mtj_loader.formats.records import FileVersion

if TYPE_CHECKING:
    import numpy as np

_DRIVE = re.compile(r"[A-Za-z]:")  # C:model.safetensors is a path of its own on Windows


class Storage(Protocol):
    """A flat or nested set of files, named by relative paths with forward slashes.

    All methods may be called from several threads at once. A path that could leave the set is
    refused with FormatError by every method: the names come from files that strangers made.
    """

    location: str  # for people

    def names(self) -> list[str]:
        """The files at the top level, sorted."""
        ...

    def exists(self, path: str) -> bool:
        """Whether there is a file of this name."""
        ...

    def stamp(self, path: str) -> FileVersion:
        """The file's size and version as they are now."""
        ...

    def stamps(self, paths: Sequence[str]) -> list[FileVersion]:
        """As `stamp`, of all of them at once."""
        ...

    def prepare(self, paths: Iterable[str]) -> dict[str, FileVersion]:
        """Says which files will be read next, from their beginnings on.

        Returns:
          The stamps of those that exist.
        """
        ...

    def read(self, path: str, offset_bytes: int, length_bytes: int) -> bytes:
        """Exactly this many bytes; nothing is allocated before the file is known to have them."""
        ...

    def read_into(self, path: str, offset_bytes: int, buffer: memoryview | np.ndarray) -> None:
        """Fills all of a writable, contiguous buffer of bytes, or raises."""
        ...

    def close(self) -> None:
        """Gives back what reading holds open; a later read opens it anew."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


@runtime_checkable
class RemoteStorage(Storage, Protocol):
    """A storage whose answers take long to begin, so that many should be asked for at once."""

    ideal_range_bytes: int  # shorter requests waste time, longer ones memory
    bytes_received: int  # so far, of all bodies

    def fetch(self, path: str, offset_bytes: int, buffer: np.ndarray) -> Future[None]:
        """Begins to fill a buffer (uint8) by one request; cancelling the future ends it."""
        ...


@dataclass(frozen=True)
class StoredFile:
    """One small file of a storage, with the methods of `pathlib.Path` that reading it takes."""

    storage: Storage
    name: str

    def read_bytes(self) -> bytes:
        """All of it; raises what `Storage.read` does."""
        return self.storage.read(self.name, 0, _prepared(self.storage, self.name).size_bytes)

    def read_text(self, encoding: str) -> str:
        """All of it, decoded."""
        return self.read_bytes().decode(encoding)

    def __str__(self) -> str:
        return self.name


def is_relative_name(path: str) -> bool:
    """Whether a name stays below its folder on every system, and is the only spelling of its file.

    Absolute paths, drives, backslashes, `.`, `..`, empty parts and control characters do not.
    """
    if not path.isprintable() or "\\" in path or _DRIVE.match(path):
        return False
    return all(part not in ("", ".", "..") for part in path.split("/"))


def check_unchanged(storage: Storage, *stamps: FileVersion) -> None:
    """Compares files with the stamps that were taken when their headers were read.

    Raises:
      CheckpointError: the size or the version of one differs, or it is gone.
    """
    for stamp, now in zip(stamps, storage.stamps([s.path for s in stamps]), strict=True):
        if now != stamp:
            raise changed(stamp, now)


def changed(stamp: FileVersion, now: FileVersion, *, key: str | None = None) -> CheckpointError:
    """The error for a file that is not the one whose header was read; `key` says where."""
    return CheckpointError(
        "the file changed after its header was read",
        file=stamp.path,
        key=key,
        expected=f"{stamp.size_bytes:,} bytes, version {stamp.version}",
        found=f"{now.size_bytes:,} bytes, version {now.version}",
        hint="load again when nothing writes to the checkpoint",
    )


def closing_all(*storages: Storage) -> ExitStack:
    """Closes all of them at the end of a `with`."""
    stack = ExitStack()
    for storage in storages:
        stack.enter_context(storage)
    return stack


def read_object(storage: Storage, path: str, max_bytes: int) -> dict[str, object]:
    """Reads a JSON file whose document is an object, see `strict_json.parse`.

    Raises:
      FormatError: it has more than `max_bytes`, or is not such a document.
    """
    length_bytes = min(_prepared(storage, path).size_bytes, max_bytes + 1)  # one more is refused
    data = storage.read(path, 0, length_bytes)
    return strict_json.parse_object(data, file=path, max_bytes=max_bytes)


def _prepared(storage: Storage, path: str) -> FileVersion:
    """The stamp of a file that is read next."""
    return storage.prepare([path]).get(path) or storage.stamp(path)  # which says that it is gone


class SharedUse(ABC):
    """`with storage` for several users at once: the last to leave closes it."""

    def __init__(self) -> None:
        self._users = 0
        self._users_lock = threading.Lock()

    @abstractmethod
    def close(self) -> None:
        """See `Storage.close`."""

    def __enter__(self) -> Self:
        with self._users_lock:
            self._users += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._users_lock:
            self._users -= 1
            if self._users == 0:
                self.close()


def truncated(path: str, offset_bytes: int, length_bytes: int, there_bytes: int) -> CheckpointError:
    """The error for a file that has fewer bytes at an offset than are needed."""
    return CheckpointError(
        "the file ends in the middle of a read",
        file=path,
        expected=f"{length_bytes:,} bytes at byte {offset_bytes:,}",
        found=f"{max(there_bytes, 0):,} bytes",
    )
