"""Hugging Face repositories: fetched into the local cache, or streamed by range requests."""

from __future__ import annotations

import asyncio
import glob
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.constants import DEFAULT_REVISION
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] -- of the client: httpx2, before 2.0 httpx
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, tqdm

from mtj_loader.errors import MtjLoaderError, StorageError, UsageError
from mtj_loader.storage import retry
from mtj_loader.storage.event_loop import LoopThread, call_in_thread
from mtj_loader.storage.retry import TRANSIENT_STATUS, RetryPolicy, TransientError
from mtj_loader.storage.urls import connect, require_obstore

if TYPE_CHECKING:
    from obstore import ObjectMeta

    from mtj_loader.storage.object_store import Located, ObjectStorage

T = TypeVar("T")

_API_SECONDS = 15.0  # a working hub answers within one; its client would wait forever

# The first match wins; a gated repository also counts as not found.
_USAGE_ERRORS: tuple[tuple[type[Exception], str, str | None], ...] = (
    (HFValidationError, "no such folder, and not a Hugging Face id", None),
    (GatedRepoError, "the repository is gated", "ask for access on its page, then pass a token"),
    (
        RepositoryNotFoundError,
        "no such folder, and no such Hugging Face repository",
        "check the name; if the repository is private, pass a token",
    ),
    (RevisionNotFoundError, "the repository has no such revision", None),
)


@dataclass(frozen=True)
class Repository:
    """A repository and how to access it.

    Attributes:
      id: `name` or `owner/name`.
      token: None means the one stored on this machine.
      cache_dir: None means the default Hugging Face cache.
      local_files_only: whether to use only the cache.
      endpoint: the hub's URL. huggingface_hub reads the variable only when it is imported.
    """

    id: str
    token: str | None = field(default=None, repr=False)
    cache_dir: Path | None = None
    local_files_only: bool = False
    endpoint: str | None = field(default_factory=lambda: os.environ.get("HF_ENDPOINT"))

    def list_files(self, revision: str | None) -> tuple[str, list[str]]:
        """The commit of a revision, and the names of all its files; with retries.

        Raises:
          UsageError: no such repository or revision, or access is denied.
          StorageError: the network failed.
        """
        revision = revision or DEFAULT_REVISION

        def request() -> tuple[str, list[str]]:
            with self.retried_errors(revision):
                api = HfApi(endpoint=self.endpoint, token=self.token)
                info = api.model_info(self.id, revision=revision, timeout=_API_SECONDS)
            return info.sha or revision, [sibling.rfilename for sibling in info.siblings or ()]

        with closing(LoopThread()) as loop:
            return loop.run(self.retry(request, file=self.id))

    async def retry(self, request: Callable[[], T], *, file: str) -> T:
        """Repeats a blocking request while it raises TransientError.

        Raises:
          StorageError: the last attempt failed, too; names the file.
        """

        def explain(found: str) -> StorageError:
            return StorageError("the hub keeps failing", file=file, found=found)

        return await retry.retry(lambda: call_in_thread(request), retry.RETRY_POLICY, explain)

    def download(
        self, revision: str | None, names: Sequence[str], *, show_progress: bool = False
    ) -> Path:
        """Fetches files into the cache, if they exist and are not there yet.

        If the hub cannot be reached, this uses what the cache has.

        Returns:
          The folder of the snapshot; its name is the commit.

        Raises:
          UsageError: no such repository or revision, access is denied, or it is not in the cache.
          StorageError: the network or the disk failed.
        """
        with self.converted_errors(revision):
            folder = snapshot_download(
                self.id,
                revision=revision,
                allow_patterns=[glob.escape(name) for name in names],
                endpoint=self.endpoint,
                token=self.token,
                cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
                tqdm_class=None if show_progress else _NoProgress,
            )
        return Path(folder)

    def not_cached(self) -> UsageError:
        """The error for files that the cache lacks."""
        hint = "load it once with network access"
        return UsageError("not in the local cache, or incomplete", file=self.id, hint=hint)

    @contextmanager
    def converted_errors(self, revision: str | None) -> Iterator[None]:
        """Raises our errors in place of huggingface_hub's."""
        try:
            yield
        except (HFValidationError, HTTPError, OSError) as error:
            raise self._convert(error, revision) from error

    @contextmanager
    def retried_errors(self, revision: str | None) -> Iterator[None]:
        """As `converted_errors`, but raises TransientError if another attempt may succeed."""
        try:
            with self.converted_errors(revision):
                yield
        except StorageError as error:
            if not _is_transient(error):
                raise
            raise TransientError(error.found) from error

    def _convert(self, error: Exception, revision: str | None) -> MtjLoaderError:
        if isinstance(error, LocalEntryNotFoundError):
            if error.__cause__ is None or isinstance(error.__cause__, OfflineModeIsEnabled):
                return self.not_cached()
            if isinstance(error.__cause__, Exception):
                error = error.__cause__  # the reason why only the cache was left
        for kind, what, hint in _USAGE_ERRORS:
            if isinstance(error, kind):
                key = None if revision is None else f"revision {revision}"
                return UsageError(what, file=self.id, key=key, hint=hint)
        found = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            return UsageError("the hub rejects the token", file=self.id, found=found)
        return StorageError("the download failed", file=self.id, found=found)


class _NoProgress(tqdm):
    """The hub's progress bar, disabled: small files need none."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **{**options, "disable": True})


def open_repository(repository: Repository, revision: str | None) -> ObjectStorage:
    """Opens a repository without the cache: every read is a range request to the hub.

    Raises:
      UsageError: no such repository or revision, access is denied, or obstore is not installed.
      StorageError: the network failed.
    """
    with require_obstore():
        from mtj_loader.storage.object_store import ObjectStorage  # noqa: PLC0415
    commit, names = repository.list_files(revision)
    policy = retry.RETRY_POLICY
    return ObjectStorage(HubOrigin(repository, commit, names, policy), policy)


class HubOrigin:
    """The files of one commit; see `Origin`.

    The hub redirects requests for a file to a signed address on another server. That address is
    used for many ranges, and is renewed once it denies access.

    Args:
      repository: where the files are.
      commit: pins their content, even if the branch moves.
      names: of all files of the commit.
      policy: for retries.
    """

    def __init__(
        self, repository: Repository, commit: str, names: list[str], policy: RetryPolicy
    ) -> None:
        self.location = f"{repository.id}@{commit}"
        self._repository, self._commit, self._policy = repository, commit, policy
        self._all_names = names
        self._located: dict[str, Located] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def locate(self, path: str) -> Located:
        """See `Origin.locate`."""
        if path not in self._all_names:
            raise FileNotFoundError(f"{self.location} has no such file")
        async with self._locks[path]:
            if path not in self._located:
                self._located[path] = await self._resolve(path)
            return self._located[path]

    async def relocate(self, path: str, refused: Located) -> Located:
        """Gets a fresh address, once for all requests that the old one denied."""
        async with self._locks[path]:
            if self._located.get(path) is refused:
                self._located[path] = await self._resolve(path)
            return self._located[path]

    async def names(self) -> list[str]:
        """See `Origin.names`."""
        return [name for name in self._all_names if "/" not in name]

    def version(self, meta: ObjectMeta) -> str:
        """The commit, which pins the content whatever server sends it."""
        return self._commit

    def close(self) -> None:
        """See `Origin.close`."""
        self._located.clear()
        self._locks.clear()

    async def _resolve(self, path: str) -> Located:
        """Asks the hub for a file's address, with retries."""
        return await self._repository.retry(
            lambda: self._request_address(path), file=f"{self.location}/{path}"
        )

    def _request_address(self, path: str) -> Located:
        """Asks the hub for a file's address; the token is sent only to the hub's own host."""
        repository = self._repository
        url = hf_hub_url(repository.id, path, revision=self._commit, endpoint=repository.endpoint)
        with repository.retried_errors(self._commit):
            address = get_hf_file_metadata(url, token=repository.token).location
        is_hub = urlsplit(address)[:2] == urlsplit(url)[:2]
        headers = build_hf_headers(token=repository.token) if is_hub else {}
        return connect(address, self._policy, headers), ""


def _is_transient(error: StorageError) -> bool:
    """Whether the hub was overloaded or not reachable."""
    cause = error.__cause__
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in TRANSIENT_STATUS
    return isinstance(cause, HTTPError)
