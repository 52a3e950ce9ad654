"""Reading files that nobody but the user can have written.

A compiled program is native code, so whoever can change it can run code as the user. As ssh does
for its keys, a file is refused unless it, its folder and every folder above belong to the user or
root, and nobody else may write to them. What was opened is checked, not its path, which may change.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtj_loader.errors import ProgramError

_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Opening a named pipe would otherwise wait for its writer.
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_ROOT = 0  # user id


@contextmanager
def open_trusted_folder(folder: Path) -> Iterator[int]:
    """Opens a folder, from the root of the file system down; yields its descriptor.

    Symbolic links in its path are resolved first, so the folders that are really opened are
    checked. If one of them is replaced by a link meanwhile, that is an error.

    Raises:
      ProgramError: the folder, or one above it, may be written by others.
      OSError: it does not exist or cannot be opened.
    """
    path = Path("/")
    descriptor = os.open(path, _OPEN_FOLDER)
    try:
        names = Path(os.path.realpath(folder, strict=True)).parts[1:]
        _check_folder(descriptor, path, is_last=not names)
        for number, name in enumerate(names, 1):
            path /= name
            outer, descriptor = descriptor, os.open(name, _OPEN_FOLDER, dir_fd=descriptor)
            os.close(outer)
            _check_folder(descriptor, path, is_last=number == len(names))
        yield descriptor
    finally:
        os.close(descriptor)


def read_trusted_file(
    folder: int, name: str, path: Path, max_bytes: int, size_bytes: int | None = None
) -> bytes:
    """Reads a whole file of a folder, once.

    Args:
      folder: from `open_trusted_folder`.
      name: of the file, without a slash.
      path: of the file, for messages.
      max_bytes: the largest size that is read.
      size_bytes: the size that the file must have, if known.

    Raises:
      ProgramError: not a plain file, one that others may write, or of the wrong size.
      OSError: it does not exist, is a symbolic link, or cannot be read.
    """
    with open(os.open(name, _OPEN_FILE, dir_fd=folder), "rb") as file:  # noqa: PTH123
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ProgramError("not a plain file", file=path)
        _check_writers(status, path)
        _check_size(status.st_size, path, max_bytes, size_bytes)
        data = file.read(status.st_size)
    _check_size(len(data), path, max_bytes, status.st_size)
    return data


def _check_folder(descriptor: int, path: Path, *, is_last: bool) -> None:
    status = os.fstat(descriptor)
    # In a folder such as /tmp, others cannot replace what belongs to the user; but they can add to
    # it, so it is no place for programs itself.
    is_sticky = bool(status.st_mode & stat.S_ISVTX)
    _check_writers(status, path, others_may_add=is_sticky and not is_last)


def _check_writers(status: os.stat_result, path: Path, *, others_may_add: bool = False) -> None:
    """Checks owner and mode; the mode also shows what an access control list allows."""
    if status.st_uid not in (os.geteuid(), _ROOT):
        raise ProgramError(
            "programs are not read from here: it belongs to another user",
            file=path,
            expected=f"user {os.geteuid()} or {_ROOT}",
            found=f"user {status.st_uid}",
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not others_may_add:
        raise ProgramError(
            "programs are not read from here: others may write to it",
            file=path,
            expected="a mode that lets only the user write, such as 0700",
            found=f"mode {stat.S_IMODE(status.st_mode):04o}",
            hint="run `chmod go-w` on it, if nobody else can have changed what is in it",
        )


def _check_size(found: int, path: Path, max_bytes: int, expected: int | None) -> None:
    if found > max_bytes:
        limit = f"at most {max_bytes:,} bytes"
        raise ProgramError("the file is too large", file=path, expected=limit, found=f"{found:,}")
    if expected is not None and found != expected:
        what = "the file does not have the size that the manifest gives"
        raise ProgramError(what, file=path, expected=f"{expected:,} bytes", found=f"{found:,}")
