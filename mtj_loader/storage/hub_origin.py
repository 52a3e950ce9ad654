"""Where the files of a Hugging Face repository are: at signed addresses that expire."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import build_hf_headers
from obstore.store import HTTPStore

from mtj_loader.errors import StorageError
from mtj_loader.storage.hub import Repository, list_commit, may_pass, our_errors
from mtj_loader.storage.origins import NO_RETRIES, client_options
from mtj_loader.storage.retry import RetryPolicy, TransientError, retry

if TYPE_CHECKING:
    from obstore import ObjectMeta

    from mtj_loader.storage.origins import Located


def hub_origin(
    repo_id: str, revision: str | None, token: str | None, policy: RetryPolicy
) -> HubOrigin:
    """Finds the commit that is meant, and its files.

    Raises:
      UsageError: no such repository or revision, or no access to it.
      StorageError: the network failed.
    """
    repository = Repository.of(repo_id, token)
    commit, names = list_commit(repository, revision)
    return HubOrigin(repository, commit, names, policy)


class HubOrigin:
    """The files of one commit.

    The hub answers a question about a file with a redirect to a signed address on other servers.
    That address is used for many ranges, and asked for anew once it is refused.

    Args:
      repository: and how to get at it.
      commit: what its files are at, whatever the branch does meanwhile.
      names: of all its files.
      policy: how long a server may stall.
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
                self._located[path] = await self._resolved(path)
            return self._located[path]

    async def relocate(self, path: str, refused: Located) -> Located:
        """Asks the hub for a fresh address, once for all requests that the old one refused."""
        async with self._locks[path]:
            if self._located.get(path) is refused:
                self._located[path] = await self._resolved(path)
            return self._located[path]

    async def names(self) -> list[str]:
        """See `Origin.names`."""
        return [name for name in self._all_names if "/" not in name]

    def version(self, meta: ObjectMeta) -> str:
        """The commit: it pins the content, whichever server sends it."""
        return self._commit

    def close(self) -> None:
        """See `Origin.close`."""
        self._located.clear()
        self._locks.clear()

    async def _resolved(self, path: str) -> Located:
        """Asks the hub until it answers."""

        def given_up(tries: str) -> StorageError:
            return StorageError(
                "the hub keeps failing", file=f"{self.location}/{path}", found=tries
            )

        return await retry(lambda: asyncio.to_thread(self._resolve, path), self._policy, given_up)

    def _resolve(self, path: str) -> Located:
        """Asks the hub; the token goes to the hub's own host and nowhere else."""
        repository = self._repository
        url = hf_hub_url(repository.id, path, revision=self._commit, endpoint=repository.endpoint)
        try:
            with our_errors(repository, self._commit):
                address = get_hf_file_metadata(url, token=repository.token).location
        except StorageError as error:
            if not may_pass(error):
                raise
            raise TransientError(error.found) from error
        same_host = urlsplit(address)[:2] == urlsplit(url)[:2]
        headers = build_hf_headers(token=repository.token) if same_host else {}
        options = client_options(
            self._policy, allow_http=address.startswith("http:"), headers=headers
        )
        return HTTPStore(address, client_options=options, retry_config=NO_RETRIES), ""
