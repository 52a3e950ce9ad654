"""Replacing a folder at once, and what killed processes left of such work.

While a conversion works on a target, its hidden folder `.<target>.<random>.partial` is locked. If
the file system cannot exchange two folders, the old target is `.<target>.<random>.old` between two
renames.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtj_loader.errors import StorageError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
# Errors that mean that the system or the file system (NFS, FUSE) cannot exchange.
_CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
# Errors that mean that the file system (NFS, Lustre) cannot lock a folder.
_CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EBADF}
_HIDDEN = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(partial|old)", re.DOTALL)


def make_hidden_path(target: Path, kind: str) -> Path:
    """A new path next to the target, for `kind` "partial" or "old"."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{kind}")


def find_hidden(target: Path, kind: str = "partial|old") -> list[Path]:
    """All such paths that exist, sorted."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.({kind})")
    return sorted(path for path in target.parent.iterdir() if pattern.fullmatch(path.name))


def visible_path(path: Path) -> Path:
    """The path that a hidden folder, or a file in one, will have in the end."""
    parent = path.parent
    if found := _HIDDEN.fullmatch(path.name):
        return parent / found[1]
    found = _HIDDEN.fullmatch(parent.name)
    return parent.with_name(found[1]) / path.name if found else path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a folder, where the file system can do so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits for `is_locked` of other processes
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                raise
        yield
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool | None:
    """Whether another process is writing a hidden folder; None if that is not known."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # gone meanwhile
        return False
    except OSError:  # such as a folder of another user
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # several may check at once
    except OSError as error:
        return True if error.errno == errno.EWOULDBLOCK else None
    finally:
        os.close(descriptor)
    return False


def restore(target: Path) -> bool:
    """Restores the old target if a process was killed between two renames.

    Of several, the one that was renamed last: another process may have been killed just after its
    second rename.
    """
    old = find_hidden(target, "old")
    if os.path.lexists(target) or not old:
        return False
    max(old, key=lambda path: path.stat().st_ctime_ns).rename(target)
    return True


def replace_folder(target: Path, folder: Path) -> None:
    """Puts a folder in the place of an existing target.

    The target always exists. If the file system cannot exchange folders, it is missing for a
    moment; `restore` repairs that after a kill. Afterwards `folder` is the old target, or gone.

    Raises:
      OSError: the target is unchanged.
      StorageError: another process created a target meanwhile; names the path of the old one.
    """
    try:
        exchange(target, folder)
    except OSError as error:
        if error.errno not in _CANNOT_EXCHANGE:
            raise
        _replace_in_two_steps(target, folder)


def exchange(first: Path, second: Path) -> None:
    """Exchanges two paths at once.

    Raises:
      OSError: the kernel, the C library or the file system cannot.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    paths = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _replace_in_two_steps(target: Path, folder: Path) -> None:
    old = make_hidden_path(target, "old")
    try:
        target.rename(old)
        folder.rename(target)
    except OSError as error:
        if not (os.path.lexists(old) and os.path.lexists(target)):
            raise
        what = "another process created the output meanwhile"
        hint = f"the old output is now {old}"
        raise StorageError(what, file=target, found=error.strerror, hint=hint) from error
    finally:
        if not os.path.lexists(folder):  # it has replaced the target
            remove(old)
        elif os.path.lexists(old) and not os.path.lexists(target):
            old.rename(target)


def remove(folder: Path) -> None:
    """Removes a folder if it exists; a Ctrl-C meanwhile is raised after it is removed."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
