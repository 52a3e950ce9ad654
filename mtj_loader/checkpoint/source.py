"""Opens a checkpoint, wherever it is: a folder, one safetensors file, or a Hugging Face id."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtj_loader.checkpoint import hub
from mtj_loader.checkpoint.index import build_index
from mtj_loader.checkpoint.naming import SUFFIX, listed
from mtj_loader.checkpoint.record import TensorIndex
from mtj_loader.checkpoint.storage import LocalStorage, Storage, read_object
from mtj_loader.errors import CheckpointError, UsageError

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
_MAX_CONFIG_BYTES = 10_000_000  # a config has a few KB; with long label lists a few MB

# A name or owner/name; anything else that is no file here is a path that was mistyped.
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers were read and whose tensors were not.

    Attributes:
      location: where it is, for people: a path, or `owner/name@commit`.
      storage: its files, closed; reading opens them, so close it again at the end.
      config, generation_config: the JSON objects; the latter is empty where there is none.
      index: its tensors.
      tokenizer_files: name → local path, of `TOKENIZER_FILES` those that are there.
    """

    location: str
    storage: Storage
    config: dict[str, object]
    generation_config: dict[str, object]
    index: TensorIndex
    tokenizer_files: Mapping[str, Path]


def open_checkpoint(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    also: Iterable[str] = (),
) -> Checkpoint:
    """Opens a checkpoint and reads the headers of its weights.

    Args:
      path_or_id: a folder; a .safetensors file with config.json beside it; or the id of a Hugging
        Face repository, of which only the files that are needed are fetched.
      revision: branch, tag or commit of the repository.
      token: for private and gated repositories; None means the one that the machine has stored.
      cache_dir: where the files are kept; None means the usual Hugging Face cache.
      local_files_only: use the cache, never the network.
      also: more files of the repository to fetch, beside the weights, configs and tokenizer.

    Raises:
      UsageError: no such path, repository or revision, or no access to it.
      CheckpointError: config.json or the weights are missing or malformed.
      StorageError: the disk or the network failed.
    """
    if (path := existing_path(path_or_id)) is not None:
        if revision is not None:
            raise UsageError("only a Hugging Face id has revisions", file=path, key="revision")
        return _open_folder(path, str(path)) if path.is_dir() else _open_file(path)
    repo_id = _hub_id(path_or_id)
    folder = hub.download(
        repo_id,
        files=(CONFIG_FILE, GENERATION_CONFIG_FILE, *TOKENIZER_FILES, *also),
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    return _open_folder(folder, location=f"{repo_id}@{folder.name}")


def repository_files(
    path_or_id: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> list[str]:
    """The names of all files of a Hugging Face repository; empty for what is on this machine.

    Raises:
      UsageError: no such path, repository or revision, or no access to it.
      StorageError: the network failed.
    """
    if existing_path(path_or_id) is not None:
        return []
    return hub.list_files(_hub_id(path_or_id), revision=revision, token=token)


def _hub_id(path_or_id: str | os.PathLike[str]) -> str:
    if isinstance(path_or_id, os.PathLike) or not _HUB_ID.fullmatch(path_or_id):
        raise UsageError("no such file or folder", file=path_or_id)
    return path_or_id


def existing_path(path_or_id: str | os.PathLike[str]) -> Path | None:
    """The path, if there is something; None for what may be a Hugging Face id.

    Raises:
      UsageError: the system cannot even look.
    """
    try:
        path = Path(path_or_id).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError) as error:  # too long, ~nobody, a NUL
        raise UsageError(
            "cannot use this path", file=ascii(path_or_id), found=str(error)
        ) from error


def _open_file(path: Path) -> Checkpoint:
    if path.suffix != SUFFIX:
        expected = f"a folder, a {SUFFIX} file or a Hugging Face id"
        raise UsageError("not a checkpoint", file=path, expected=expected)
    return _open_folder(path.parent, location=str(path), files=[path.name])


def _open_folder(folder: Path, location: str, files: Sequence[str] | None = None) -> Checkpoint:
    with LocalStorage(folder) as storage:  # closed after the headers; a later read opens it anew
        return Checkpoint(
            location=location,
            storage=storage,
            config=_read_config(storage),
            generation_config=_read_generation_config(storage),
            index=build_index(storage, files),
            tokenizer_files={n: storage.root / n for n in TOKENIZER_FILES if storage.exists(n)},
        )


def _read_config(storage: LocalStorage) -> dict[str, object]:
    if not storage.exists(CONFIG_FILE):
        raise CheckpointError(
            "not a checkpoint: there is no config.json",
            file=storage.root,
            found=listed(storage.names()) or "no file at all",
        )
    return read_object(storage, CONFIG_FILE, _MAX_CONFIG_BYTES)


def _read_generation_config(storage: Storage) -> dict[str, object]:
    if not storage.exists(GENERATION_CONFIG_FILE):
        return {}
    return read_object(storage, GENERATION_CONFIG_FILE, _MAX_CONFIG_BYTES)
