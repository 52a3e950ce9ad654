"""Planning a conversion: what is read, what is written and where, before anything is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mtj_loader import options
from mtj_loader.conversion.casting import SPELLINGS
from mtj_loader.conversion.output_folder import check_room
from mtj_loader.conversion.output_layout import Move, OutputFile, plan_files
from mtj_loader.conversion.small_files import is_small_file, sort_files
from mtj_loader.dtypes import parameter_dtype
from mtj_loader.errors import StorageError, UsageError
from mtj_loader.formats.checkpoint import (
    Checkpoint,
    existing_path,
    open_checkpoint,
    repository_files,
)
from mtj_loader.formats.file_names import SUFFIX
from mtj_loader.storage.base import Storage
from mtj_loader.storage.local import LocalStorage

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Source:
    """A checkpoint, opened.

    Attributes:
      checkpoint: its headers.
      names: other files and folders that are where it comes from; a folder's end in a slash.
      warnings: what was noticed on the way.
    """

    checkpoint: Checkpoint
    names: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class ConvertPlan:
    """A conversion to be.

    Attributes:
      checkpoint: what is read.
      target: the folder that is written; its path has no links.
      dtype: of the new floats, as numpy spells it.
      files: the weights.
      copied, left_out: the other files of the checkpoint that are copied and not.
      warnings: what was noticed and is no error.
    """

    checkpoint: Checkpoint
    target: Path
    dtype: str
    files: tuple[OutputFile, ...]
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def moves(self) -> list[Move]:
        """Every tensor, in the order of the new files."""
        return [move for file in self.files for move in file.moves]

    @property
    def source_bytes(self) -> int:
        """All tensors, as they are read."""
        return sum(move.source.size_bytes for move in self.moves)


def find_target(src: PathLike, out: PathLike | None, dtype: str) -> Path:
    """The folder to make, without links in its path: a rename replaces a folder, not a link.

    Without `out` it is `<name>-<dtype>`, beside the source where that is on this machine.

    Raises:
      UsageError: a path that cannot be one.
    """
    path = existing_path(src)
    if out is not None:
        return _resolved(out)
    if path is None:  # a URL, whose query is no name, or a Hugging Face id
        name = Path(os.fspath(src).partition("?")[0]).name
        return Path.cwd() / f"{name.removesuffix(SUFFIX)}-{dtype}"
    path = path.resolve() if path.name in ("", "..") else path.absolute()  # they have a name too
    return path.parent.resolve() / f"{path.name.removesuffix(SUFFIX)}-{dtype}"


def _resolved(path: PathLike) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, ~nobody, a NUL
        raise UsageError("cannot use this path", file=ascii(path), found=str(error)) from error


def open_source(source: options.Source) -> Source:
    """Opens a checkpoint; of a repository all small files are fetched too.

    Raises:
      UsageError, CheckpointError, StorageError: as `open_checkpoint`.
    """
    names: list[str] = []
    warnings: tuple[str, ...] = ()
    try:
        if not source.local_files_only:
            names = repository_files(source)
    except StorageError:  # open_checkpoint may yet find all it needs in the cache
        warnings = ("the hub cannot be reached: only files that the cache has were copied",)
    also = [name for name in names if is_small_file(name, 0) and "/" not in name]
    checkpoint = open_checkpoint(source, also=also)
    return Source(checkpoint, _other_names(checkpoint.storage, names), warnings)


def _other_names(storage: Storage, names: list[str]) -> tuple[str, ...]:
    """Files and folders at the top of a repository; without its names, the folders here."""
    if not names and isinstance(storage, LocalStorage):
        names = [f"{path.name}/" for path in storage.root.iterdir() if path.is_dir()]
    parts = [name.partition("/") for name in names]
    return tuple({first + slash for first, slash, _ in parts})


def make_plan(source: Source, target: Path, dtype: str, max_shard_bytes: int) -> ConvertPlan:
    """Decides what goes where.

    Args:
      source: what is read.
      target: see `find_target`.
      dtype: of the new floats, as numpy spells it.
      max_shard_bytes: of the tensors in a new file.

    Raises:
      UsageError: the target holds the source.
      CheckpointError: a tensor's dtype is neither kept nor converted.
      StorageError: the disk has not enough room.
    """
    checkpoint, storage = source.checkpoint, source.checkpoint.storage
    if isinstance(storage, LocalStorage) and storage.root.resolve().is_relative_to(target):
        raise UsageError("the output would replace its source", file=target)
    new_dtype = SPELLINGS[parameter_dtype(dtype)]
    files = plan_files(checkpoint.index.records.values(), new_dtype, max_shard_bytes)
    check_room(target, sum(file.size_bytes for file in files))
    copied, left_out = sort_files(checkpoint, source.names)
    warnings = (*checkpoint.index.warnings, *source.warnings)
    return ConvertPlan(checkpoint, target, dtype, files, tuple(copied), tuple(left_out), warnings)
