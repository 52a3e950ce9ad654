"""Storages that are not on this machine: URLs, and Hugging Face repositories read by ranges.

Only here is obstore imported, an optional dependency.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit, urlunsplit

from mtj_loader.errors import UsageError
from mtj_loader.formats.file_names import SUFFIX
from mtj_loader.storage import retry
from mtj_loader.storage.base import is_relative_name

if TYPE_CHECKING:
    from mtj_loader.storage.object_store import ObjectStorage

BUCKET_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss")
SCHEMES = (*BUCKET_SCHEMES, "http", "https")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint's path begins with a scheme such as s3://."""
    return isinstance(path, str) and _URL.match(path) is not None


def open_url(url: str) -> tuple[ObjectStorage, list[str] | None]:
    """Opens the objects below a URL; asks the server nothing yet.

    Args:
      url: of a folder-like prefix, or of one .safetensors object.

    Returns:
      The storage of the folder, and the one file that is meant, None for all of them.

    Raises:
      UsageError: no store has such URLs, or obstore is not installed.
    """
    try:
        scheme, host, path, query, _ = urlsplit(url)
    except ValueError as error:  # half an IPv6 address
        raise UsageError("not a checkpoint's URL", found=str(error)) from error
    if scheme not in SCHEMES or not host:
        expected = "a URL that begins with " + ", ".join(f"{s}://" for s in SCHEMES)
        raise UsageError(
            "not a checkpoint's URL",
            expected=expected,
            found=f"{scheme}://{host.rpartition('@')[2]}",
        )
    files = None
    if path.endswith(SUFFIX):
        path, _, name = path.rpartition("/")
        files = [unquote(name)]
        if not is_relative_name(files[0]):
            raise UsageError("not a file's name", found=ascii(files[0]))
    with _obstore():
        from mtj_loader.storage.object_store import ObjectStorage  # noqa: PLC0415
        from mtj_loader.storage.origins import origin_of  # noqa: PLC0415
    folder = urlunsplit((scheme, host, path.rstrip("/"), query, ""))
    return ObjectStorage(origin_of(folder, retry.RETRY_POLICY), retry.RETRY_POLICY), files


def open_repository(
    repo_id: str, *, revision: str | None, token: str | None
) -> tuple[ObjectStorage, list[str] | None]:
    """Opens a Hugging Face repository without its cache: every read is a range from the hub.

    Returns:
      As `open_url`.

    Raises:
      UsageError: no such repository or revision, no access to it, or obstore is not installed.
      StorageError: the network failed.
    """
    with _obstore():
        from mtj_loader.storage.hub_origin import hub_origin  # noqa: PLC0415
        from mtj_loader.storage.object_store import ObjectStorage  # noqa: PLC0415
    origin = hub_origin(repo_id, revision, token, retry.RETRY_POLICY)
    return ObjectStorage(origin, retry.RETRY_POLICY), None


@contextmanager
def _obstore() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "obstore":
            raise
        raise UsageError(
            "reading over the network needs the package obstore",
            hint="pip install 'mtj-loader[remote]'",
        ) from error
