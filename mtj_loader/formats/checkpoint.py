"""Opens a checkpoint from a folder, a safetensors file, a URL or a Hugging Face id."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mtj_loader.errors import CheckpointError, StorageError, UsageError
from mtj_loader.formats.checkpoint_index import build_index, read_index
from mtj_loader.formats.file_names import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    INDEX_FILE,
    OTHER_WEIGHTS,
    SINGLE_FILE,
    SUFFIX,
    TOKENIZER_FILES,
    USUAL_FILES,
    choose_files,
    join_names,
)
from mtj_loader.formats.records import TensorIndex
from mtj_loader.formats.strict_json import read_object
from mtj_loader.options import Source
from mtj_loader.storage.base import Storage, StoredFile, is_relative_name
from mtj_loader.storage.local import LocalStorage
from mtj_loader.storage.urls import is_url, open_url

if TYPE_CHECKING:
    from mtj_loader.storage.hub import Repository
    from mtj_loader.storage.object_store import ObjectStorage

_MAX_CONFIG_BYTES = 10_000_000  # a config has a few KB, or a few MB with long label lists

# A name or owner/name; anything else that does not exist is a mistyped path.
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Headers:
    """What planning needs of a checkpoint; a host that gets it from another host reads nothing.

    Attributes:
      config, generation_config: the JSON objects; the latter is empty if there is no such file.
      index: the tensors.
    """

    config: dict[str, object]
    generation_config: dict[str, object]
    index: TensorIndex


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers were read, but not its tensors.

    Attributes:
      location: for messages: a path, a URL, or `owner/name@commit`.
      storage: the files, closed; a read opens them, so close it again afterwards.
      config, generation_config: the JSON objects; the latter is empty if there is no such file.
      index: the tensors.
      tokenizer_files: those of `TOKENIZER_FILES` that exist, by name.
      commit: of a Hugging Face repository, None otherwise.
    """

    location: str
    storage: Storage
    config: dict[str, object]
    generation_config: dict[str, object]
    index: TensorIndex
    tokenizer_files: Mapping[str, Path | StoredFile]
    commit: str | None = None

    def __repr__(self) -> str:
        return f"<Checkpoint {self.location}: {self.index!r}>"


def open_checkpoint(
    source: Source,
    *,
    also: Iterable[str] = (),
    headers: Headers | None = None,
    weights_required: bool = True,
) -> Checkpoint:
    """Opens a checkpoint and reads the headers of its weights.

    Args:
      source: a folder; a .safetensors file with config.json beside it; the URL of either on S3,
        Google Cloud Storage, Azure or an HTTP server; or a Hugging Face repository, from which
        only the needed files are downloaded.
      also: more files of the repository to download, in addition to weights, configs and tokenizer.
      headers: the headers, if another host has already read them.
      weights_required: False also opens a folder with config.json and no weights; its index is
        empty, with a warning.

    Raises:
      UsageError: the path, repository or revision does not exist, or access is denied.
      CheckpointError: config.json or the weights are missing or malformed.
      StorageError: the disk or the network failed.
    """
    is_remote = is_url(source.path)
    path = None if is_remote else existing_path(source.path)
    if source.revision is not None and (path is not None or is_remote):
        raise UsageError("only a Hugging Face id has revisions", file=path, key="revision")
    if path is not None:
        if not weights_required and headers is None and path.is_dir():
            headers = _read_config_alone(path)
        return _open_path(path, headers)
    if source.local_files_only and (source.stream or is_remote):
        what = "a URL or streaming needs the network"
        raise UsageError(what, file=source.path, key="local_files_only")
    if is_remote:
        opened = open_url(str(source.path), file_suffix=SUFFIX, fallback_names=USUAL_FILES)
        return _open_remote(*opened, headers)
    from mtj_loader.storage import hub  # noqa: PLC0415 -- its client takes 0.2 s to import

    cache = None if source.cache_dir is None else Path(source.cache_dir)
    repo_id = _hub_id(source.path)
    repository = hub.Repository(repo_id, source.token, cache, source.local_files_only)
    if source.stream:
        checkpoint = _open_remote(hub.open_repository(repository, source.revision), None, headers)
        return replace(checkpoint, commit=checkpoint.location.rpartition("@")[2])
    folder = _download(repository, source.revision, also)
    checkpoint = _open(LocalStorage(folder), f"{repo_id}@{folder.name}", None, headers)
    return replace(checkpoint, commit=folder.name)


def repository_files(source: Source) -> list[str]:
    """The names of all files of a Hugging Face repository; empty for a path or URL.

    Raises:
      UsageError: no such path, repository or revision, or access is denied.
      StorageError: the network failed.
    """
    if is_url(source.path) or existing_path(source.path) is not None:
        return []
    from mtj_loader.storage.hub import Repository  # noqa: PLC0415 -- see `open_checkpoint`

    return Repository(_hub_id(source.path), source.token).list_files(source.revision)[1]


def _download(repository: Repository, revision: str | None, also: Iterable[str]) -> Path:
    """Fetches a repository's weights and small files into the cache.

    Returns:
      The folder of the snapshot; its name is the commit.
    """
    small = (CONFIG_FILE, GENERATION_CONFIG_FILE, *TOKENIZER_FILES, *also, INDEX_FILE)
    folder = repository.download(revision, small)
    weights = _weight_files(repository, folder)
    if not all((folder / name).is_file() for name in weights):
        if repository.local_files_only:
            raise repository.not_cached()
        repository.download(folder.name, weights, show_progress=True)
    return folder


def _weight_files(repository: Repository, folder: Path) -> list[str]:
    """The names of a snapshot's weights, from as few requests as possible."""
    with LocalStorage(folder) as storage:
        if storage.exists(INDEX_FILE):
            return read_index(storage).shards
    cached = [path.name for path in folder.glob(f"*{SUFFIX}")]
    if SINGLE_FILE in cached:
        return [SINGLE_FILE]
    if repository.local_files_only:
        return choose_files(cached or [SINGLE_FILE], location=repository.id)
    try:
        listed = filter(is_relative_name, repository.list_files(folder.name)[1])
        return choose_files(listed, location=repository.id)
    except StorageError:
        if not cached:
            raise
    return choose_files(cached, location=repository.id)


def _hub_id(path_or_id: str | os.PathLike[str]) -> str:
    if isinstance(path_or_id, os.PathLike) or not _HUB_ID.fullmatch(path_or_id):
        raise UsageError("no such file or folder", file=path_or_id)
    return path_or_id


def existing_path(path_or_id: str | os.PathLike[str]) -> Path | None:
    """The path if it exists; None for what may be a Hugging Face id.

    Raises:
      UsageError: the operating system rejects the path.
    """
    try:
        path = Path(path_or_id).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError) as error:  # too long, an unknown ~user, a NUL
        raise UsageError(
            "cannot use this path", file=ascii(path_or_id), found=str(error)
        ) from error


def _open_path(path: Path, headers: Headers | None) -> Checkpoint:
    if path.is_dir():
        return _open(LocalStorage(path), str(path), None, headers)
    if path.suffix != SUFFIX:
        expected = f"a folder, a {SUFFIX} file, a URL or a Hugging Face id"
        raise UsageError("not a checkpoint", file=path, expected=expected)
    return _open(LocalStorage(path.parent), str(path), [path.name], headers)


def _open_remote(
    storage: ObjectStorage, files: list[str] | None, headers: Headers | None
) -> Checkpoint:
    """Requests all usual files together, instead of one after another."""
    try:
        if headers is None:
            storage.prepare([*USUAL_FILES, *(files or ())])
        else:
            storage.expect(headers.index.files.values())
            storage.prepare(TOKENIZER_FILES)
    except BaseException:
        storage.close()
        raise
    location = f"{storage.location}/{files[0]}" if files else storage.location
    return _open(storage, location, files, headers)


def _open(
    storage: Storage, location: str, files: Sequence[str] | None, headers: Headers | None
) -> Checkpoint:
    with storage:  # closed after the headers; a later read reopens it
        read = headers or _read_headers(storage, files)
        return Checkpoint(
            location=location,
            storage=storage,
            config=read.config,
            generation_config=read.generation_config,
            index=read.index,
            tokenizer_files={
                n: _tokenizer_file(storage, n) for n in TOKENIZER_FILES if storage.exists(n)
            },
        )


def _tokenizer_file(storage: Storage, name: str) -> Path | StoredFile:
    return storage.root / name if isinstance(storage, LocalStorage) else StoredFile(storage, name)


def _read_headers(storage: Storage, files: Sequence[str] | None) -> Headers:
    return Headers(*_read_configs(storage), build_index(storage, files))


def _read_configs(storage: Storage) -> tuple[dict[str, object], dict[str, object]]:
    """config.json, and generation_config.json if there is one."""
    if not storage.exists(CONFIG_FILE):
        raise CheckpointError(
            "not a checkpoint: there is no config.json",
            file=storage.location,
            found=join_names(storage.names()) or "no files",
        )
    config, generation_config = (
        read_object(storage, name, _MAX_CONFIG_BYTES) if storage.exists(name) else {}
        for name in (CONFIG_FILE, GENERATION_CONFIG_FILE)
    )
    return config, generation_config


def _read_config_alone(folder: Path) -> Headers | None:
    """The headers of a folder without weights of any format; None if there are any."""
    with LocalStorage(folder) as storage:
        if any(name.endswith((SUFFIX, INDEX_FILE, *OTHER_WEIGHTS)) for name in storage.names()):
            return None
        warning = "there are no weights here; this is what config.json says"
        return Headers(*_read_configs(storage), TensorIndex({}, {}, (warning,)))
