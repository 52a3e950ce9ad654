"""Translates obstore's exceptions into ours.

obstore has a class for each of the statuses 304, 401, 403, 404, 409 and 412. It raises everything
else as GenericError, whose HTTP status and kind of network failure are only in its text, for
example (as of 0.12)

    Generic HTTP error: Error performing GET http://host/path in 1.2ms - Server returned non-2xx
    status code: 503 Service Unavailable: <the response's body>

    Debug source:
    Generic { store: "HTTP", source: … HttpError { kind: Timeout, source: … } … }

This is the only module that reads that text; tests/storage/test_server_errors.py compares it with
what the installed obstore raises.
"""

from __future__ import annotations

import re

from obstore.exceptions import (
    BaseError,
    GenericError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)

from mtj_loader.errors import CheckpointError, MtjLoaderError, StorageError
from mtj_loader.storage.retry import TRANSIENT_STATUS, TransientError

_STATUS = re.compile(r"status code: (\d{3})")
# A lost connection, a timeout, or a body that broke off.
_TRANSIENT_KIND = re.compile(r"HttpError \{\s*kind: (Connect|Request|Timeout|Interrupted)\b")
_SOURCE = re.compile(r"\n+Debug source:.*", re.DOTALL)
_REQUEST = re.compile(r".*Error performing [A-Z]+ \S+ in \S+?( ?, after .*?)? +- ", re.DOTALL)
_USER = re.compile(r"://[^/@\s]*@")
_QUERY = re.compile(r"\?[^\s\"')]+")
_XML = re.compile(r"<Code>(?P<code>.*?)</Code>.*?<Message>(?P<message>.*?)</Message>", re.DOTALL)
_REASON = re.compile(r'(?:message|error): "([^"]+)"')  # the operating system's message
_MAX_CHARACTERS = 300  # of a server's message; error pages are longer


def translate(
    error: MtjLoaderError | TransientError | BaseError | FileNotFoundError,
    file: str,
    key: str | None,
) -> MtjLoaderError | TransientError:
    """Our error for one that ended a request; it refers to no credentials and to no response.

    Args:
      error: raised by obstore or by us. A response that it refers to holds a connection open.
      file: the object's name, for the message.
      key: the range of bytes, for the message.
    """
    _drop_tracebacks(error)
    if isinstance(error, MtjLoaderError):  # its cause may be an error of the hub with a response
        error.__cause__ = error.__context__ = None
        return error
    if isinstance(error, TransientError):
        return TransientError(str(error))
    is_retried = _is_transient(error)
    ours = TransientError(describe(error)) if is_retried else _final_error(error, file, key)
    ours.__cause__ = type(error)(_QUERY.sub("?…", _USER.sub("://", str(error))))
    return ours


def _drop_tracebacks(error: BaseException | None) -> None:
    """Frees the frames of an error and of those before it.

    They refer to stores and responses, and in a cycle to the future that holds the error, so
    connections would stay open until garbage is collected.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status of the response, None if there was none."""
    match = _STATUS.search(str(error))
    return int(match[1]) if match else None


def describe(error: BaseException) -> str:
    """What the server or the operating system said, without the URL: it may contain a signature."""
    text = str(error)
    line = _REQUEST.sub("", _SOURCE.sub("", text)).strip()
    status = _STATUS.search(line)
    if status and (document := _XML.search(line)):
        return f"HTTP {status[1]}: {document['code']}, {document['message']}"
    if status:
        line = "HTTP " + line[status.start(1) :].strip().rstrip(":")
    if status is None and (reason := _REASON.search(text)):
        line = f"{line}: {reason[1]}"
    if "kind: Timeout" in text:
        line = f"{line}: no data within the time limit"
    return " ".join(line.split())[:_MAX_CHARACTERS]


def _is_transient(error: BaseError | FileNotFoundError) -> bool:
    """Whether the same request may succeed a moment later."""
    if not isinstance(error, GenericError):
        return False
    status = status_of(error)
    if status is not None:
        return status in TRANSIENT_STATUS
    return _TRANSIENT_KIND.search(str(error)) is not None


def _final_error(
    error: BaseError | FileNotFoundError, file: str, key: str | None
) -> MtjLoaderError:
    """Our error for a failure that a retry would not fix."""
    found = describe(error)
    match error:
        case FileNotFoundError():
            return CheckpointError("the file is missing", file=file, found=found)
        case PermissionDeniedError() | UnauthenticatedError():
            what = "the server refuses access"
            hint = "check the credentials; some stores also answer like this for missing files"
        case NotSupportedError():
            what = "the server does not support range requests"
            hint = "copy the checkpoint here, or to a server that supports range requests"
        case _ if status_of(error) == 404:
            return CheckpointError("bucket or endpoint not found", file=file, found=found)
        case _:
            what, hint = "a request failed", None
    return StorageError(what, file=file, key=key, found=found, hint=hint)
