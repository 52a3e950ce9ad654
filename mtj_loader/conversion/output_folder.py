"""A folder that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtj_loader.display import show_bytes
from mtj_loader.errors import StorageError, UsageError
from mtj_loader.formats.checkpoint import CONFIG_FILE

_FULL = {errno.ENOSPC, errno.EDQUOT}


def check_target(target: Path, *, overwrite: bool) -> None:
    """Checks that a folder may be made, before work goes into it.

    Args:
      target: the folder, without links in its path.
      overwrite: a checkpoint that is there may be replaced; nothing else ever is.

    Raises:
      UsageError: it may not.
    """
    if not target.parent.is_dir():
        raise UsageError("the folder for the output does not exist", file=target.parent)
    if not os.path.lexists(target):
        return
    if not overwrite:
        hint = "overwrite replaces it, another name leaves it there"
        raise UsageError("the output exists already", file=target, hint=hint)
    if not (target / CONFIG_FILE).is_file() and (not target.is_dir() or any(target.iterdir())):
        what = "the output exists and is not a checkpoint: it is not replaced"
        raise UsageError(
            what, file=target, expected=f"a folder with {CONFIG_FILE}, or an empty one"
        )


def check_room(target: Path, size_bytes: int) -> None:
    """Raises StorageError if the disk has not so many bytes left."""
    free = shutil.disk_usage(target.parent).free
    if free < size_bytes:
        raise StorageError(
            "there is not enough room on the disk",
            file=target.parent,
            expected=show_bytes(size_bytes),
            found=show_bytes(free),
        )


@contextmanager
def new_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """An empty folder beside the target, which becomes the target when the block ends well.

    When it does not, for whatever reason, the folder is removed and the target is as it was. What
    was written is on the disk before it gets the target's name. A process that is killed outright
    leaves a hidden folder `.<target>.<random>.partial`, which nothing reads.

    Raises:
      StorageError: the system refused to write.
    """
    folder = _sibling(target, "partial")
    try:
        with write_errors(folder):
            folder.mkdir()
        yield folder
        with write_errors(folder):
            _sync(folder)
            if overwrite:
                _replace(target, folder)
            else:
                folder.rename(target)  # which fails where something came up meanwhile
            _sync_one(target.parent)
    finally:
        _remove(folder)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Makes StorageError of what the system says about writing."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        hint = "make room, or name another disk with --out" if error.errno in _FULL else None
        found = error.strerror or str(error)
        raise StorageError("cannot write", file=path, found=found, hint=hint) from error


def write_at(path: Path, offset_bytes: int, data: memoryview) -> None:
    """Writes all bytes at this place of a file, which is made if it is not there.

    Raises:
      StorageError: the disk is full, or the system refused.
    """
    with write_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], offset_bytes + done)
        finally:
            os.close(descriptor)


def _replace(target: Path, folder: Path) -> None:
    """Gives the folder its name; what has the name now is put aside first, and removed last."""
    old = _sibling(target, "old")
    try:
        if target.exists():
            target.rename(old)
        folder.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        _remove(old)


def _remove(folder: Path) -> None:
    """Removes a folder, if it is there; Ctrl-C in the middle has to wait until it is gone."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _sync(folder: Path) -> None:
    """Waits until the disk has every file of the folder."""
    for path in folder.iterdir():
        _sync_one(path)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{kind}")
