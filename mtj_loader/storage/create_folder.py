"""Creating a folder that appears complete or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mtj_loader.errors import StorageError
from mtj_loader.storage.replace_folder import (
    locked,
    make_hidden_path,
    remove,
    replace_folder,
    visible_path,
)

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_EXISTS = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}


@contextmanager
def create_folder(target: Path, *, overwrite: bool, mode: int = 0o777) -> Iterator[Path]:
    """Creates an empty folder next to the target; renames it to the target when the block succeeds.

    If the block fails, the folder is removed and the target is unchanged. Files are synced to the
    disk before the rename. A process that is killed leaves a hidden folder, which nothing reads
    and the next conversion names.

    Args:
      target: the folder; its parent exists.
      overwrite: replaces the target if it exists.
      mode: of the folder, limited by the process's umask.

    Raises:
      StorageError: writing failed, or another process created the target meanwhile.
    """
    folder = make_hidden_path(target, "partial")
    try:
        with ExitStack() as stack:
            with convert_write_errors(folder):
                folder.mkdir(mode)
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
