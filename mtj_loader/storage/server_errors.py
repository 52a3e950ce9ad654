"""What a server's failures mean: which are transient, and how to report the others.

obstore puts the HTTP status and the response into the text of its errors, so that text is parsed.
"""

from __future__ import annotations

import re

from mtj_loader.errors import CheckpointError, MtjLoaderError, StorageError


class TransientError(Exception):
    """A failure that a retry may fix, such as a truncated body or an overloaded hub."""


# Timeouts, throttling, and everything that the server calls its own failure.
TRANSIENT_STATUS = {408, 429} | set(range(500, 600))
_STATUS = re.compile(r"status code: (\d{3})")
# obstore's kinds for a lost connection, a timeout, and a body that broke off.
_TRANSIENT_KIND = re.compile(r"\bkind: (Connect|Request|Timeout|Interrupted)\b")
_SOURCE = re.compile(r"\n+Debug source:.*", re.DOTALL)
_REQUEST = re.compile(r".*Error performing [A-Z]+ \S+ in \S+?( ?, after .*?)? +- ", re.DOTALL)
_USER = re.compile(r"://[^/@\s]*@")
_QUERY = re.compile(r"\?[^\s\"')]+")
_XML = re.compile(r"<Code>(?P<code>.*?)</Code>.*?<Message>(?P<message>.*?)</Message>", re.DOTALL)
_REASON = re.compile(r'(?:message|error): "([^"]+)"')  # the operating system's message
_MAX_CHARACTERS = 300  # of a server's message; error pages are longer


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, TransientError):
        return True
    if isinstance(error, MtjLoaderError):
        return False
    status = status_of(error)
    if status is not None:
        return status in TRANSIENT_STATUS
    return _TRANSIENT_KIND.search(str(error)) is not None


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


def without_secrets(error: BaseException) -> BaseException:
    """A copy of an error, for use as the cause of another one.

    The copy has no user names and queries of URLs, which can be credentials. The original and the
    errors before it lose their tracebacks: these refer to responses, which hold connections open.
    """
    previous: BaseException | None = error
    while previous is not None:
        previous.__traceback__ = None
        previous = previous.__cause__ or previous.__context__
    return type(error)(_QUERY.sub("?…", _USER.sub("://", str(error))))


def to_loader_error(error: Exception, file: str, key: str | None) -> MtjLoaderError:
    """Our error for a failure that a retry would not fix.

    Args:
      error: raised by obstore.
      file: the object's name, for the message.
      key: the range of bytes, for the message.
    """
    found = describe(error)
    if isinstance(error, FileNotFoundError):
        return CheckpointError("the file is missing", file=file, found=found)
    if status_of(error) == 404:
        return CheckpointError("bucket or endpoint not found", file=file, found=found)
    if status_of(error) in (401, 403):
        hint = "check the credentials; some stores also answer like this for missing files"
        return StorageError("the server refuses access", file=file, key=key, found=found, hint=hint)
    if "Range request not supported" in found:
        hint = "copy the checkpoint to this machine, or to a server that supports range requests"
        what = "the server does not support range requests"
        return StorageError(what, file=file, key=key, found=found, hint=hint)
    return StorageError("a request failed", file=file, key=key, found=found)
