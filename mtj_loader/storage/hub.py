"""Hugging Face repositories: what they hold, and the needed files brought into the local cache."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import DEFAULT_REVISION
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from mtj_loader.errors import MtjLoaderError, StorageError, UsageError
from mtj_loader.formats.checkpoint_index import read_weight_map
from mtj_loader.formats.file_names import INDEX_FILE, SINGLE_FILE, SUFFIX, choose_files
from mtj_loader.storage.local import LocalStorage
from mtj_loader.storage.retry import TRANSIENT_STATUS

_ANSWER_SECONDS = 15.0  # a hub that is there answers within one; its client would wait for ever

# What the hub's HTTP client raises on a lost connection; the name of that client changes.
_ClientError: type[Exception] = HfHubHTTPError.__bases__[0]

# The first that fits; a gated repository counts as not found, too.
_CALLERS_FAULT: tuple[tuple[type[Exception], str, str | None], ...] = (
    (HFValidationError, "no such folder, and not a Hugging Face id", None),
    (GatedRepoError, "the repository is gated", "ask for access on its page, then give a token"),
    (
        RepositoryNotFoundError,
        "no such folder, and no such Hugging Face repository",
        "check the name; if it is private, give a token",
    ),
    (RevisionNotFoundError, "the repository has no such revision", None),
)


@dataclass(frozen=True)
class Repository:
    """A repository and how to get at it."""

    id: str
    token: str | None
    cache_dir: Path | None
    local_files_only: bool
    endpoint: str | None

    @classmethod
    def of(cls, repo_id: str, token: str | None) -> Repository:
        """A repository that is asked over the network, without a cache."""
        endpoint = os.environ.get("HF_ENDPOINT")  # read anew: huggingface_hub does so at import
        return cls(repo_id, token, None, False, endpoint)


def download(
    repo_id: str,
    *,
    files: Sequence[str],
    revision: str | None,
    token: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    """Fetches the weights and `files`, as far as they exist and are not in the cache already.

    When the hub cannot be reached, what the cache has is used, if it is complete.

    Returns:
      The folder of the snapshot; its name is the commit.

    Raises:
      UsageError: no such repository or revision, no access to it, or not in the cache.
      CheckpointError: the repository has no safetensors weights, or a malformed index.
      StorageError: the network or the disk failed.
    """
    cache = None if cache_dir is None else Path(cache_dir)
    endpoint = os.environ.get("HF_ENDPOINT")  # read anew: huggingface_hub does so at import only
    repository = Repository(repo_id, token, cache, local_files_only, endpoint)
    folder = _fetch(repository, revision, [*files, INDEX_FILE], bar=_NoBar)
    weights = _weight_files(repository, folder)
    if not all((folder / name).is_file() for name in weights):
        if local_files_only:
            raise _not_cached(repo_id)
        _fetch(repository, folder.name, weights)
    return folder


def list_files(repo_id: str, *, revision: str | None, token: str | None) -> list[str]:
    """The names of all files of a repository.

    Raises:
      UsageError: no such repository or revision, or no access to it.
      StorageError: the network failed.
    """
    return list_commit(Repository.of(repo_id, token), revision)[1]


def list_commit(repository: Repository, revision: str | None) -> tuple[str, list[str]]:
    """The commit that a revision stands for, and the names of all its files.

    Raises:
      UsageError: no such repository or revision, or no access to it.
      StorageError: the network failed.
    """
    revision = revision or DEFAULT_REVISION
    with our_errors(repository, revision):
        api = HfApi(endpoint=repository.endpoint, token=repository.token)
        info = api.model_info(repository.id, revision=revision, timeout=_ANSWER_SECONDS)
    return info.sha or revision, [sibling.rfilename for sibling in info.siblings or ()]


class _NoBar(tqdm):
    """The hub's progress bar, unseen: the small files need none."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **{**options, "disable": True})


def _fetch(
    repository: Repository,
    revision: str | None,
    names: Sequence[str],
    bar: type[tqdm] | None = None,
) -> Path:
    with our_errors(repository, revision):
        folder = snapshot_download(
            repository.id,
            revision=revision,
            allow_patterns=[glob.escape(name) for name in names],
            endpoint=repository.endpoint,
            token=repository.token,
            cache_dir=repository.cache_dir,
            local_files_only=repository.local_files_only,
            tqdm_class=bar,
        )
    return Path(folder)


def _weight_files(repository: Repository, folder: Path) -> list[str]:
    with LocalStorage(folder) as storage:
        if storage.exists(INDEX_FILE):
            return read_weight_map(storage).shards
    weights = [path.name for path in folder.glob(f"*{SUFFIX}")]
    if SINGLE_FILE in weights:
        return [SINGLE_FILE]
    if repository.local_files_only:
        return choose_files(weights or [SINGLE_FILE])
    try:
        return choose_files(list_commit(repository, folder.name)[1])
    except StorageError:
        if not weights:
            raise
    return choose_files(weights)


@contextmanager
def our_errors(repository: Repository, revision: str | None) -> Iterator[None]:
    """Raises our errors for those of huggingface_hub."""
    try:
        yield
    except (HFValidationError, _ClientError, OSError) as error:
        raise _translated(error, repository.id, revision) from error


def may_pass(error: StorageError) -> bool:
    """Whether the hub, asked again, may answer what it did not: it was overloaded, or not there."""
    cause = error.__cause__
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in TRANSIENT_STATUS
    return isinstance(cause, _ClientError)


def _translated(error: Exception, repo_id: str, revision: str | None) -> MtjLoaderError:
    if isinstance(error, LocalEntryNotFoundError):
        if error.__cause__ is None or isinstance(error.__cause__, OfflineModeIsEnabled):
            return _not_cached(repo_id)
        if isinstance(error.__cause__, Exception):
            error = error.__cause__  # why it was looked for there at all
    for kind, what, hint in _CALLERS_FAULT:
        if isinstance(error, kind):
            key = None if revision is None else f"revision {revision}"
            return UsageError(what, file=repo_id, key=key, hint=hint)
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return UsageError("the hub refuses the token", file=repo_id, found=_first_line(error))
    return StorageError("the download failed", file=repo_id, found=_first_line(error))


def _not_cached(repo_id: str) -> UsageError:
    hint = "load it once with the network on"
    return UsageError("not in the local cache, or not all of it", file=repo_id, hint=hint)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
