"""The files of a local folder."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mtj_loader.errors import CheckpointError, FormatError
from mtj_loader.storage.base import (
    ByteRange,
    FileVersion,
    ReadCosts,
    Storage,
    as_bytes,
    is_relative_name,
    os_error,
    truncated_error,
)

if TYPE_CHECKING:
    import numpy as np

# A zonal SSD persistent disk of one virtual machine: 1,200 MiB/s and 100,000 requests per second
# (Google Cloud's documentation, "About Persistent Disk performance").
DISK = ReadCosts(1200 * 2**20, 100_000, range_bytes=1 << 20, high_latency=False)

# Errors that mean there is no such file, including a loop of links and a name that is too long.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


class LocalStorage(Storage):
    """The files of one folder; each is opened once, and read with `preadv` by any thread.

    A symbolic link may point anywhere inside the folder. In a snapshot folder of the Hugging Face
    cache, where every file is a link, it may also point to the blobs of that cache.
    """

    costs = DISK
    checks_versions = False
    extra_bytes = 0  # see `Reader`

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root.absolute()  # the working directory may change
        self.location = str(root)  # as the user spells it
        self._allowed = [folder.resolve() for folder in _readable_folders(root.resolve())]
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The files at the top level, sorted.

        Raises:
          StorageError: the folder cannot be listed.
        """
        try:
            return sorted(e.name for e in self.root.iterdir() if e.exists() and not e.is_dir())
        except OSError as error:
            raise os_error("cannot list the folder", self.root, error) from error

    def exists(self, path: str) -> bool:
        """Whether there is a file, or a pipe or device, which cannot be read; see `version`."""
        status = self._status(path)
        return status is not None and not stat.S_ISDIR(status.st_mode)

    def version(self, path: str) -> FileVersion:
        """The file's current size and modification time, looked up by its name each time.

        Raises:
          CheckpointError: the file does not exist.
          FormatError: it is not a regular file, or the path leaves the folder.
          StorageError: the operating system cannot read its status.
        """
        status = self._status(path)
        if status is None:
            raise CheckpointError("the file is missing", file=path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
            raise FormatError("not a regular file", file=path)
        return FileVersion(path, status.st_size, str(status.st_mtime_ns))

    def read(self, path: str, offset_bytes: int, length_bytes: int) -> bytes:
        """Reads exactly this many bytes.

        Raises:
          CheckpointError: the file is missing or too short.
          StorageError: the read failed.
        """
        available_bytes = os.fstat(self._descriptor(path)).st_size - offset_bytes
        if length_bytes > available_bytes:
            raise truncated_error(path, offset_bytes, length_bytes, available_bytes)
        buffer = bytearray(length_bytes)
        self.read_into(path, offset_bytes, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, path: str, offset_bytes: int, buffer: memoryview | np.ndarray) -> None:
        """Fills all of a writable, contiguous buffer of bytes.

        Raises:
          CheckpointError: the file is missing or too short.
          StorageError: the read failed.
        """
        if not (view := as_bytes(buffer)):
            return
        descriptor = self._descriptor(path)
        done = 0
        while done < len(view):  # a single call stops at 2 GiB
            try:
                count = os.preadv(descriptor, [view[done:]], offset_bytes + done)
            except OSError as error:
                what = f"a read at byte {offset_bytes + done:,} failed"
                raise os_error(what, self.root / path, error) from error
            if count == 0:
                raise truncated_error(path, offset_bytes, len(view), done)
            done += count

    def reader(self, ranges: Iterable[ByteRange], budget_bytes: int) -> LocalStorage:
        """This storage: the operating system reads ahead by itself."""
        return self

    def stop(self) -> None:
        """Does nothing: no request is in flight; see `Reader.stop`."""

    def close(self) -> None:
        """Closes every file; a later read reopens it."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def _descriptor(self, path: str) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = self._open(path)
            return self._descriptors[path]

    def _open(self, path: str) -> int:
        self.version(path)  # raises if it is not a regular file
        target = self._resolve(path)
        try:
            return os.open(target, os.O_RDONLY)
        except OSError as error:
            raise os_error("cannot open the file", target, error) from error

    def _status(self, path: str) -> os.stat_result | None:
        target = self._resolve(path)
        try:
            return target.stat()
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise os_error("cannot read the status of the file", target, error) from error

    def _resolve(self, path: str) -> Path:
        if not is_relative_name(path):
            raise FormatError("not a relative file name", file=ascii(path))
        target = Path(os.path.realpath(self.root / path))  # Path.resolve fails on a loop of links
        if not any(target.is_relative_to(folder) for folder in self._allowed):
            raise FormatError(
                "a symbolic link leaves the checkpoint's folder",
                file=path,
                expected=f"a file in {self.root}",
                found=target,
                hint="use the folder that contains the files themselves",
            )
        return target


def _readable_folders(root: Path) -> list[Path]:
    """The folder; for `models--…/snapshots/<commit>` also the cache's folders of blobs."""
    for folder in root.parents:
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            repository, cache = folder.parent, folder.parent.parent
            # The cache's own folder of blobs is shared by all repositories.
            return [root, repository / "blobs", cache / "blobs"]
    return [root]
