"""Which store answers for a URL: S3, Google Cloud Storage, Azure, or a plain HTTP server."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit, urlunsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import HTTPStore, from_url

from mtj_loader.errors import StorageError, UsageError
from mtj_loader.storage.remote import BUCKET_SCHEMES
from mtj_loader.storage.retry import RetryPolicy, said

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

    Located = tuple[ObjectStore, str]  # a store, and the object's key in it

# Where a store of one's own is named; obstore speaks HTTPS alone unless it is told otherwise.
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")
_REQUEST_SECONDS = 600  # for a range: a server that trickles is no better than one that stalls
_CONNECT_SECONDS = 10


class Origin(Protocol):
    """Finds the objects of one checkpoint. The coroutines run in the storage's event loop."""

    @property
    def location(self) -> str:
        """For people: without what could be secret."""
        ...

    async def locate(self, path: str) -> Located:
        """Where a file is."""
        ...

    async def relocate(self, path: str, refused: Located) -> Located:
        """Where it is now, after access was refused there; the same where addresses stay."""
        ...

    async def names(self) -> list[str] | None:
        """The files at the top level; None where the server has no listing."""
        ...

    def version(self, meta: ObjectMeta) -> str:
        """What changes when the object does, of an answer."""
        ...

    def close(self) -> None:
        """Drops the connections."""
        ...


class StoreOrigin:
    """The objects below one URL.

    Args:
      location: the URL, for people.
      connect: makes the store.
      lists: whether it knows which objects there are.
    """

    def __init__(self, location: str, connect: Callable[[], ObjectStore], *, lists: bool) -> None:
        self.location = location
        self._connect, self._lists = connect, lists
        self._store = connect()

    async def locate(self, path: str) -> Located:
        """See `Origin.locate`."""
        if self._store is None:
            self._store = self._connect()
        return self._store, path

    async def relocate(self, path: str, refused: Located) -> Located:
        """See `Origin.relocate`."""
        return refused

    async def names(self) -> list[str] | None:
        """See `Origin.names`."""
        if not self._lists:
            return None
        store, _ = await self.locate("")
        listing = await obstore.list_with_delimiter_async(store)
        return [entry["path"] for entry in listing["objects"]]

    def version(self, meta: ObjectMeta) -> str:
        """The etag; without one the time of the last change.

        Raises:
          StorageError: the server says neither, so that nobody could tell two versions apart.
        """
        if meta["e_tag"]:
            return meta["e_tag"]
        if meta["last_modified"].timestamp() == 0:  # obstore's word for none
            what = "the server says neither an etag nor when the file last changed"
            hint = "copy the checkpoint to this machine"
            raise StorageError(what, file=f"{self.location}/{meta['path']}", hint=hint)
        return meta["last_modified"].isoformat()

    def close(self) -> None:
        """See `Origin.close`."""
        self._store = None


def origin_of(url: str, policy: RetryPolicy) -> StoreOrigin:
    """The origin for a URL of a folder-like prefix.

    Credentials and endpoints are what obstore takes from the environment.

    Raises:
      UsageError: no store can be made of it.
    """
    scheme = urlsplit(url).scheme
    location = without_secrets(url)
    http = scheme == "http" or any(os.environ.get(k, "").startswith("http:") for k in _ENDPOINTS)
    options = client_options(policy, allow_http=http)

    def connect() -> ObjectStore:
        try:
            if scheme in BUCKET_SCHEMES:
                return from_url(url, client_options=options, retry_config=NO_RETRIES)
            return HTTPStore(url, client_options=options, retry_config=NO_RETRIES)
        except (BaseError, ValueError) as error:
            raise UsageError("cannot use this URL", file=location, found=said(error)) from error

    return StoreOrigin(location, connect, lists=scheme in BUCKET_SCHEMES)


NO_RETRIES: RetryConfig = {"max_retries": 0}  # `retry.persist` makes them


def client_options(
    policy: RetryPolicy, *, allow_http: bool, headers: Mapping[str, str] | None = None
) -> ClientConfig:
    """Settings of obstore's HTTP client."""
    options: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
        "read_timeout": timedelta(seconds=policy.stalled_seconds),
        "timeout": timedelta(seconds=_REQUEST_SECONDS),
    }
    if allow_http:
        options["allow_http"] = True
    if headers:
        options["default_headers"] = dict(headers)
    return options  # pyright: ignore[reportReturnType]


def without_secrets(url: str) -> str:
    """A URL without its query and user name, which may let anybody in."""
    scheme, host, path, _, _ = urlsplit(url)
    if not scheme.startswith("abfs"):  # there it is the container's name, and no secret
        host = re.sub(r".*@", "", host)
    return urlunsplit((scheme, host, path.rstrip("/"), "", ""))
