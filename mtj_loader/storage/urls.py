"""Checkpoints at a URL: on S3, Google Cloud Storage, Azure, or a plain HTTP server.

obstore is an optional dependency, so it is imported only when a URL is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit, urlunsplit

from mtj_loader.errors import StorageError, UsageError
from mtj_loader.storage import retry
from mtj_loader.storage.base import is_relative_name
from mtj_loader.storage.retry import RetryPolicy

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, ObjectStore

    from mtj_loader.storage.object_store import Located, ObjectStorage

_BUCKET_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss")
_SCHEMES = (*_BUCKET_SCHEMES, "http", "https")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")

# These may name a private server; obstore allows plain HTTP only if it is told to.
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")
_REQUEST_SECONDS = 600  # for a whole range; a server that only trickles counts as stalled
_CONNECT_SECONDS = 10


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint's path starts with a scheme such as s3://."""
    return isinstance(path, str) and _URL.match(path) is not None


def open_url(
    url: str, *, file_suffix: str, fallback_names: Sequence[str] = ()
) -> tuple[ObjectStorage, list[str] | None]:
    """Opens the objects below a URL; sends no request yet.

    Credentials and endpoints are what obstore takes from the environment.

    Args:
      url: a prefix that acts as a folder, or one object whose name ends in `file_suffix`.
      file_suffix: see `url`.
      fallback_names: see `ObjectStorage`.

    Returns:
      The storage of the folder, and the one file of the URL, None for all files.

    Raises:
      UsageError: the URL is not supported, or obstore is not installed.
    """
    scheme, host, path, query = _split(url)
    files = None
    if path.endswith(file_suffix):
        path, _, name = path.rpartition("/")
        files = [unquote(name)]
        if not is_relative_name(files[0]):
            raise UsageError("not a file name", found=ascii(files[0]))
    with require_obstore():
        from mtj_loader.storage.object_store import ObjectStorage  # noqa: PLC0415
    folder = urlunsplit((scheme, host, path.rstrip("/"), query, ""))
    policy = retry.RETRY_POLICY
    return ObjectStorage(UrlOrigin(folder, policy), policy, fallback_names), files


class UrlOrigin:
    """The objects below one URL; see `Origin`.

    Args:
      url: a prefix that acts as a folder.
      policy: how long a server may stall.

    Raises:
      UsageError: obstore cannot use the URL.
    """

    def __init__(self, url: str, policy: RetryPolicy) -> None:
        self.location = _without_secrets(url)
        self._url, self._policy = url, policy
        self._can_list = urlsplit(url).scheme in _BUCKET_SCHEMES
        self._store: ObjectStore | None = self._connect()

    def _connect(self) -> ObjectStore:
        return connect(self._url, self._policy)

    async def locate(self, path: str) -> Located:
        """See `Origin.locate`."""
        if self._store is None:
            self._store = self._connect()
        return self._store, path

    async def relocate(self, path: str, refused: Located) -> Located:
        """See `Origin.relocate`; a URL does not move."""
        return refused

    async def names(self) -> list[str] | None:
        """See `Origin.names`."""
        from obstore import list_with_delimiter_async  # noqa: PLC0415

        if not self._can_list:
            return None
        store, _ = await self.locate("")
        listing = await list_with_delimiter_async(store)
        return [entry["path"] for entry in listing["objects"]]

    def version(self, meta: ObjectMeta) -> str:
        """The etag, or without one the modification time.

        Raises:
          StorageError: the server sends neither, so a change could not be noticed.
        """
        if meta["e_tag"]:
            return meta["e_tag"]
        if meta["last_modified"].timestamp() == 0:  # obstore's value for none
            what = "the server sends neither an etag nor a modification time"
            hint = "copy the checkpoint to this machine"
            raise StorageError(what, file=f"{self.location}/{meta['path']}", hint=hint)
        return meta["last_modified"].isoformat()

    def close(self) -> None:
        """See `Origin.close`."""
        self._store = None


def connect(url: str, policy: RetryPolicy, headers: Mapping[str, str] | None = None) -> ObjectStore:
    """The store of a URL; it does not retry, see `retry`.

    Raises:
      UsageError: obstore cannot use the URL.
    """
    from obstore.exceptions import BaseError  # noqa: PLC0415
    from obstore.store import HTTPStore, from_url  # noqa: PLC0415

    from mtj_loader.storage.server_errors import describe  # noqa: PLC0415

    scheme = urlsplit(url).scheme
    is_bucket = scheme in _BUCKET_SCHEMES
    options: ClientConfig = {
        "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
        "read_timeout": timedelta(seconds=policy.stalled_seconds),
        "timeout": timedelta(seconds=_REQUEST_SECONDS),
    }
    endpoints = [os.environ.get(name, "") for name in _ENDPOINTS] if is_bucket else []
    if any(address.startswith("http:") for address in (url, *endpoints)):
        options["allow_http"] = True
    if headers:
        options["default_headers"] = dict(headers)
    try:
        make: Callable[..., ObjectStore] = from_url if is_bucket else HTTPStore
        return make(url, client_options=options, retry_config={"max_retries": 0})
    except (BaseError, ValueError) as error:
        location = _without_secrets(url)
        raise UsageError("cannot use this URL", file=location, found=describe(error)) from error


@contextmanager
def require_obstore() -> Iterator[None]:
    """Turns a missing obstore package into a UsageError that names it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "obstore":
            raise
        raise UsageError(
            "reading over the network needs the package obstore",
            hint="pip install 'mtj-loader[remote]'",
        ) from error


def _split(url: str) -> tuple[str, str, str, str]:
    """Scheme, host, path and query."""
    try:
        scheme, host, path, query, _ = urlsplit(url)
    except ValueError as error:  # half an IPv6 address
        raise UsageError("not the URL of a checkpoint", found=str(error)) from error
    if scheme not in _SCHEMES or not host:
        raise UsageError(
            "not the URL of a checkpoint",
            expected="a URL that starts with " + ", ".join(f"{s}://" for s in _SCHEMES),
            found=f"{scheme}://{host.rpartition('@')[2]}",
        )
    return scheme, host, path, query


def _without_secrets(url: str) -> str:
    """A URL without query and user name, which can be credentials."""
    scheme, host, path, _, _ = urlsplit(url)
    if not scheme.startswith("abfs"):  # where the part before @ is the container's name
        host = re.sub(r".*@", "", host)
    return urlunsplit((scheme, host, path.rstrip("/"), "", ""))
