"""The output folder of a conversion: what it may replace, and writing into it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mtj_loader.display import show_bytes
from mtj_loader.errors import StorageError, UsageError
from mtj_loader.formats.checkpoint import CONFIG_FILE
from mtj_loader.storage.create_folder import convert_write_errors
from mtj_loader.storage.replace_folder import find_hidden, is_locked, restore


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
