"""The interface that every storage implements, and the code that storages share."""

from __future__ import annotations

import os
import re
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from mtj_loader.errors import CheckpointError, FormatError, StorageError

if TYPE_CHECKING:
    import numpy as np

ByteRange = tuple[str, int, int]  # file, first byte, byte after the last

_DRIVE = re.compile(r"[A-Za-z]:")  # C:model.safetensors is absolute on Windows


@dataclass(frozen=True)
class FileVersion:
    """A file as it was when its header was read; a change between plan and read is an error."""

    path: str  # relative, as the storage names it
    size_bytes: int
    version: str  # modification time in nanoseconds, or an object store's etag


@dataclass(frozen=True)
class ReadCosts:
    """What one host gets from a storage.

    Attributes:
      bytes_per_second: throughput with long requests, many at once.
      requests_per_second: how many requests can start, however short they are.
      range_bytes: best length of a request; shorter ones waste time, longer ones memory.
      high_latency: requests take long to answer, so readers should send many in advance and read
        small gaps instead of splitting a request.
    """

    bytes_per_second: float
    requests_per_second: float
    range_bytes: int
    high_latency: bool


class Reader(Protocol):
    """Serves the reads of one load or comparison to several threads."""

    @property
    def extra_bytes(self) -> int:
        """Bytes transferred beyond those read: gaps, and responses that broke off."""
        ...

    def read_into(self, path: str, offset_bytes: int, buffer: np.ndarray) -> None:
        """Fills a contiguous uint8 buffer, like `Storage.read_into`."""
        ...

    def stop(self) -> None:
        """Cancels all requests; threads that wait get an error."""
        ...


class Storage(ABC):
    """A set of files, named by relative paths with forward slashes.

    All methods are thread-safe. File names are untrusted input: every method raises FormatError
    for a path that could leave the set. Several users may enter `with storage` at once; the last
    one to leave closes it.

    Attributes:
      location: the folder, URL or repository, for messages; contains no secrets.
      costs: how expensive reads are.
      checks_versions: every read is checked against the file's version, and all hosts see the same
        versions. Otherwise callers compare hosts, and call `check_unchanged` during a load.
    """

    location: str
    costs: ReadCosts
    checks_versions: bool

    def __init__(self) -> None:
        self._users = 0
        self._users_lock = threading.Lock()

    @abstractmethod
    def names(self) -> list[str]:
        """The files at the top level, sorted."""

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Whether the file exists."""

    @abstractmethod
    def version(self, path: str) -> FileVersion:
        """The file's current size and version."""

    def versions(self, paths: Sequence[str]) -> list[FileVersion]:
        """Like `version`, for many files."""
        return [self.version(path) for path in paths]

    def prepare(self, paths: Iterable[str]) -> dict[str, FileVersion]:
        """Announces files whose first bytes will be read next.

        Returns:
          The versions of those that exist.
        """
        return {path: self.version(path) for path in paths if self.exists(path)}

    @abstractmethod
    def read(self, path: str, offset_bytes: int, length_bytes: int) -> bytes:
        """Reads exactly this many bytes; checks the file's size before it allocates memory."""

    @abstractmethod
    def read_into(self, path: str, offset_bytes: int, buffer: memoryview | np.ndarray) -> None:
        """Fills all of a writable, contiguous buffer of bytes, or raises."""

    @abstractmethod
    def reader(self, ranges: Iterable[ByteRange], budget_bytes: int) -> Reader:
        """A reader for a known sequence of reads.

        Args:
          ranges: everything that will be read, in order.
          budget_bytes: most memory for data that is read ahead.
        """

    @abstractmethod
    def close(self) -> None:
        """Releases files and connections; a later read reopens them."""

    def __enter__(self) -> Self:
        with self._users_lock:
            self._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        with self._users_lock:
            self._users -= 1
            if self._users == 0:
                self.close()


@dataclass(frozen=True)
class StoredFile:
    """One small file of a storage, for code that also reads files by their path."""

    storage: Storage
    name: str

    @property
    def size_bytes(self) -> int:
        """The current size."""
        return prepare_file(self.storage, self.name).size_bytes

    def read_bytes(self) -> bytes:
        """Reads the whole file; raises the same errors as `Storage.read`."""
        return self.storage.read(self.name, 0, self.size_bytes)

    def __str__(self) -> str:
        return self.name


def read_small(file: Path | StoredFile, max_bytes: int) -> bytes:
    """Reads a whole file that may not be large.

    Raises:
      FormatError: it is not a regular file, or has more than `max_bytes`.
      CheckpointError, StorageError: it cannot be read.
    """
    if isinstance(file, Path):
        return read_file(file, max_bytes)
    _check_size(file, file.size_bytes, max_bytes)
    return file.read_bytes()


def read_file(path: Path, max_bytes: int) -> bytes:
    """Reads a small file at a path that the user gave.

    Raises:
      FormatError: it is not a regular file, or has more than `max_bytes`.
      StorageError: the operating system cannot read it.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FormatError("not a regular file", file=path)
            _check_size(path, status.st_size, max_bytes)
            data = file.read(max_bytes + 1)  # it may grow meanwhile
    except OSError as error:
        raise os_error("cannot read the file", path, error) from error
    except ValueError as error:  # a NUL in the path
        raise StorageError("cannot read the file", file=ascii(path), found=error) from error
    _check_size(path, len(data), max_bytes)
    return data


def _check_size(file: Path | StoredFile, size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        expected, found = f"at most {max_bytes:,} bytes", f"{size_bytes:,} bytes"
        raise FormatError("the file is too large", file=file, expected=expected, found=found)


def _open_at_once(path: str, flags: int) -> int:
    """Opens a file; does not wait for the writer of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def closing_all(*storages: Storage) -> ExitStack:
    """A context manager that closes all of them at its end."""
    stack = ExitStack()
    for storage in storages:
        stack.enter_context(storage)
    return stack


def prepare_file(storage: Storage, path: str) -> FileVersion:
    """The version of a file that will be read next.

    Raises:
      CheckpointError: the file does not exist.
    """
    return storage.prepare([path]).get(path) or storage.version(path)  # raises if it is missing


def is_relative_name(path: str) -> bool:
    """Whether a name stays below its folder on every system and is the file's only spelling.

    Rejects absolute paths, drives, backslashes, `.`, `..`, empty parts and control characters.
    """
    if not path.isprintable() or "\\" in path or _DRIVE.match(path):
        return False
    return all(part not in ("", ".", "..") for part in path.split("/"))


def as_bytes(buffer: memoryview | np.ndarray) -> memoryview:
    """The bytes of a contiguous buffer."""
    if buffer.nbytes == 0:  # an empty view cannot be cast
        return memoryview(b"")
    return (buffer if isinstance(buffer, memoryview) else buffer.data).cast("B")


def check_unchanged(storage: Storage, *expected: FileVersion) -> None:
    """Compares files with the versions recorded when their headers were read.

    Raises:
      CheckpointError: a size or version differs, or a file is missing.
    """
    current = storage.versions([version.path for version in expected])
    for before, now in zip(expected, current, strict=True):
        if now != before:
            raise changed_error(before, now)


def changed_error(
    before: FileVersion, now: FileVersion, *, key: str | None = None
) -> CheckpointError:
    """The error for a file that changed after its header was read; `key` says where."""
    return CheckpointError(
        "the file changed after its header was read",
        file=before.path,
        key=key,
        expected=f"{before.size_bytes:,} bytes, version {before.version}",
        found=f"{now.size_bytes:,} bytes, version {now.version}",
        hint="load again when nothing writes to the checkpoint",
    )


def truncated_error(
    path: str, offset_bytes: int, length_bytes: int, available_bytes: int
) -> CheckpointError:
    """The error for a file that has too few bytes after an offset."""
    return CheckpointError(
        "the file ends in the middle of a read",
        file=path,
        expected=f"{length_bytes:,} bytes at byte {offset_bytes:,}",
        found=f"{max(available_bytes, 0):,} bytes",
    )


def os_error(what: str, file: object, error: OSError) -> StorageError:
    """The error for a call that the operating system refused."""
    return StorageError(what, file=file, found=error.strerror or str(error))
