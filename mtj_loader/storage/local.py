"""A checkpoint's files in a folder of this machine."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtj_loader.errors import CheckpointError, FormatError, StorageError
from mtj_loader.formats.records import FileVersion
from mtj_loader.storage.base import SharedUse, is_relative_name, truncated

if TYPE_CHECKING:
    import numpy as np

# What the system says when there is no file: also for a loop of links, and for too long a name.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


class LocalStorage(SharedUse):
    """The files of one folder; each is opened once and read with `preadv`, by any thread.

    A symbolic link may point anywhere inside the folder. In a snapshot folder of the Hugging Face
    cache, where every file is a link, it may also point to the blobs of that cache.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root.absolute()  # the working folder may change
        self.location = str(self.root)
        self._allowed = [folder.resolve() for folder in _readable_folders(root.resolve())]
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The files at the top level, sorted.

        Raises:
          StorageError: the folder cannot be listed.
        """
        try:
            return sorted(entry.name for entry in self.root.iterdir() if entry.is_file())
        except OSError as error:
            raise _machine_error("cannot list the folder", self.root, error) from error

    def exists(self, path: str) -> bool:
        """Whether there is a file of this name; a link to nothing is no file."""
        status = self._status(path)
        return status is not None and stat.S_ISREG(status.st_mode)

    def stamp(self, path: str) -> FileVersion:
        """The file's size and modification time, read anew, so that a replaced file shows.

        Raises:
          CheckpointError: there is no such file.
          FormatError: it is not a regular file, or the path leaves the folder.
          StorageError: the system does not answer.
        """
        status = self._status(path)
        if status is None:
            raise CheckpointError("the file is missing", file=path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
            raise FormatError("not a regular file", file=path)
        return FileVersion(path, status.st_size, str(status.st_mtime_ns))

    def stamps(self, paths: Sequence[str]) -> list[FileVersion]:
        """As `stamp`, of all of them."""
        return [self.stamp(path) for path in paths]

    def prepare(self, paths: Iterable[str]) -> dict[str, FileVersion]:
        """The stamps of those that exist; see `stamp`."""
        return {path: self.stamp(path) for path in paths if self.exists(path)}

    def read(self, path: str, offset_bytes: int, length_bytes: int) -> bytes:
        """Exactly this many bytes.

        Raises:
          CheckpointError: the file is missing or ends before.
          StorageError: the read failed.
        """
        there_bytes = os.fstat(self._descriptor(path)).st_size - offset_bytes
        if length_bytes > there_bytes:
            raise truncated(path, offset_bytes, length_bytes, there_bytes)
        buffer = bytearray(length_bytes)
        self.read_into(path, offset_bytes, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, path: str, offset_bytes: int, buffer: memoryview | np.ndarray) -> None:
        """Fills all of a writable, contiguous buffer of bytes.

        Raises:
          CheckpointError: the file is missing or ends before the buffer is full.
          StorageError: the read failed.
        """
        if buffer.nbytes == 0:  # which cannot be cast
            return
        view = (buffer if isinstance(buffer, memoryview) else buffer.data).cast("B")
        descriptor = self._descriptor(path)
        done = 0
        while done < len(view):  # a single call stops at 2 GiB
            try:
                count = os.preadv(descriptor, [view[done:]], offset_bytes + done)
            except OSError as error:
                what = f"a read at byte {offset_bytes + done:,} failed"
                raise _machine_error(what, self.root / path, error) from error
            if count == 0:
                raise truncated(path, offset_bytes, len(view), done)
            done += count

    def close(self) -> None:
        """Closes every file; a later read opens it anew."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def _descriptor(self, path: str) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = self._open(path)
            return self._descriptors[path]

    def _open(self, path: str) -> int:
        self.stamp(path)  # a regular file, or its error
        target = self._resolve(path)
        try:
            return os.open(target, os.O_RDONLY)
        except OSError as error:
            raise _machine_error("cannot open the file", target, error) from error

    def _status(self, path: str) -> os.stat_result | None:
        target = self._resolve(path)
        try:
            return target.stat()
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise _machine_error("cannot look at the file", target, error) from error

    def _resolve(self, path: str) -> Path:
        if not is_relative_name(path):
            raise FormatError("not a relative file name", file=ascii(path))
        target = Path(os.path.realpath(self.root / path))  # Path.resolve raises on a loop of links
        if not any(target.is_relative_to(folder) for folder in self._allowed):
            raise FormatError(
                "a symbolic link leaves the checkpoint's folder",
                file=path,
                expected=f"a file in {self.root}",
                found=target,
                hint="name the folder that holds the files themselves",
            )
        return target


def _readable_folders(root: Path) -> list[Path]:
    """The folder; for `models--…/snapshots/<commit>` also where that cache keeps its blobs."""
    for folder in root.parents:
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            repository, cache = folder.parent, folder.parent.parent
            return [root, repository / "blobs", cache / "blobs"]  # the last is shared by all
    return [root]


def _machine_error(what: str, path: object, error: OSError) -> StorageError:
    return StorageError(what, file=path, found=error.strerror or str(error))
