"""The output folder, which appears complete or not at all."""

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

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


def check_target(target: Path, *, overwrite: bool) -> None:
    """Checks that a folder may be created, before any work is done.

    Args:
      target: the folder, without links in its path.
      overwrite: an existing checkpoint or empty folder may be replaced; nothing else ever is.

    Raises:
      UsageError: it may not be created.
    """
    if not target.parent.is_dir():
        raise UsageError("the parent folder of the output does not exist", file=target.parent)
    if not os.path.lexists(target):
        return
    if not overwrite:
        hint = "use overwrite to replace it, or choose another name"
        raise UsageError("the output exists already", file=target, hint=hint)
    if not (target / CONFIG_FILE).is_file() and (not target.is_dir() or any(target.iterdir())):
        what = "the output exists and is not a checkpoint, so it is not replaced"
        raise UsageError(
            what, file=target, expected=f"a folder with {CONFIG_FILE}, or an empty one"
        )


def check_disk_space(target: Path, size_bytes: int) -> None:
    """Raises StorageError if the disk does not have this many bytes free."""
    free = shutil.disk_usage(target.parent).free
    if free < size_bytes:
        raise StorageError(
            "not enough disk space",
            file=target.parent,
            expected=show_bytes(size_bytes),
            found=show_bytes(free),
        )


@contextmanager
def create_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Creates an empty folder next to the target; renames it to the target when the block succeeds.

    If the block fails, the folder is removed and the target is unchanged. Files are synced to the
    disk before the rename. A process that is killed leaves a hidden folder
    `.<target>.<random>.partial`, which nothing reads.

    Raises:
      StorageError: writing failed.
    """
    folder = _make_sibling_path(target, "partial")
    try:
        with convert_write_errors(folder):
            folder.mkdir()
        yield folder
        with convert_write_errors(folder):
            _sync_folder(folder)
            if overwrite:
                _replace(target, folder)
            else:
                folder.rename(target)  # fails if the target was created meanwhile
            _sync_path(target.parent)
    finally:
        _remove(folder)


@contextmanager
def convert_write_errors(path: Path) -> Iterator[None]:
    """Converts an OSError from writing to a StorageError."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        hint = (
            "free disk space, or choose another disk with --out"
            if error.errno in _DISK_FULL
            else None
        )
        found = error.strerror or str(error)
        raise StorageError("cannot write", file=path, found=found, hint=hint) from error


def write_at(path: Path, offset_bytes: int, data: memoryview) -> None:
    """Writes all bytes at an offset of a file, which is created if it does not exist.

    Raises:
      StorageError: the disk is full, or writing failed.
    """
    with convert_write_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], offset_bytes + done)
        finally:
            os.close(descriptor)


def _replace(target: Path, folder: Path) -> None:
    """Renames the folder to the target; an existing target is moved away first and removed last."""
    old = _make_sibling_path(target, "old")
    try:
        if target.exists():
            target.rename(old)
        folder.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        _remove(old)


def _remove(folder: Path) -> None:
    """Removes a folder if it exists; a Ctrl-C meanwhile is raised after it is removed."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Syncs every file of the folder, and the folder, to the disk."""
    for path in folder.iterdir():
        _sync_path(path)
    _sync_path(folder)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_sibling_path(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{kind}")
