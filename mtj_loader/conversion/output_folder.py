"""The output folder, which appears complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mtj_loader.conversion.replace_folder import (
    find_hidden,
    is_locked,
    locked,
    make_hidden_path,
    remove,
    replace_folder,
    restore,
    visible_path,
)
from mtj_loader.display import show_bytes
from mtj_loader.errors import StorageError, UsageError
from mtj_loader.formats.checkpoint import CONFIG_FILE

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_EXISTS = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}


def check_target(target: Path, *, overwrite: bool) -> list[str]:
    """Checks that a folder may be created, before any work is done.

    Args:
      target: the folder, without links in its path.
      overwrite: an existing checkpoint or empty folder may be replaced; nothing else ever is.

    Returns:
      Warnings about what processes that were killed left next to the target.

    Raises:
      UsageError: it may not be created, or another process is creating it.
      StorageError: it cannot be read, or its parent folder cannot be read or changed.
    """
    with convert_write_errors(target):
        if not target.parent.is_dir():
            raise UsageError("the parent folder of the output does not exist", file=target.parent)
        if any(map(is_locked, find_hidden(target))):
            raise UsageError("another process is writing this output", file=target)
        restored = restore(target)
        left = [_describe_left(path) for path in find_hidden(target)]
        if os.path.lexists(target):
            _check_existing(target, overwrite=overwrite, restored=restored)
    return left


def _describe_left(path: Path) -> str:
    if is_locked(path) is None:
        return f"left by a conversion that was killed, or written by one that still runs: {path}"
    if path.suffix == ".old":  # also left if another process created the target meanwhile
        return f"an earlier output, left by an overwrite; delete it if you do not need it: {path}"
    return f"left by a conversion that was killed; delete it: {path}"


def _check_existing(target: Path, *, overwrite: bool, restored: bool) -> None:
    if not overwrite:
        found = "restored after an overwrite that was killed" if restored else None
        hint = "use overwrite to replace it, or choose another name"
        raise UsageError("the output exists already", file=target, found=found, hint=hint)
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
    disk before the rename. A process that is killed leaves a hidden folder, which nothing reads
    and the next conversion names.

    Raises:
      StorageError: writing failed, or another process created the target meanwhile.
    """
    folder = make_hidden_path(target, "partial")
    try:
        with ExitStack() as stack:
            with convert_write_errors(folder):
                folder.mkdir()
                stack.enter_context(locked(folder))
            yield folder
            with convert_write_errors(folder):
                _sync_folder(folder)
                if overwrite and os.path.lexists(target):
                    replace_folder(target, folder)
                else:
                    _rename_to_new(folder, target)
                _sync_path(target.parent)
    finally:
        remove(folder)


def _rename_to_new(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno in _EXISTS:
            what = "another process created the output meanwhile"
            raise StorageError(what, file=target, found=error.strerror) from error
        raise


@contextmanager
def convert_write_errors(path: Path) -> Iterator[None]:
    """Converts an OSError from writing to a StorageError, which names the final path."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        full = error.errno in _DISK_FULL
        hint = "free disk space, or choose another disk with --out" if full else None
        file, found = visible_path(path), error.strerror or str(error)
        raise StorageError("cannot write", file=file, found=found, hint=hint) from error


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
