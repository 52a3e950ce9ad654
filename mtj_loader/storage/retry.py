"""Failures of servers: which are worth another try, how long to wait, and what to say of the rest.

Retries are made here and not by obstore, which starts a failed body anew only where the answer
has an etag, and whose time limit counts from the first byte of a large range.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from mtj_loader.errors import CheckpointError, MtjLoaderError, StorageError

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """How long a failing server is borne with.

    Attributes:
      attempts: at one range or question; the waits between eight add up to about ten seconds,
        after which object stores that ask to slow down have scaled up.
      first_wait_seconds: before the second attempt; each further wait is twice as long.
      longest_wait_seconds: no wait is longer.
      stalled_seconds: a connection that brings nothing for so long has failed.
      total_seconds: no attempt is begun later than this after the first.
    """

    attempts: int = 8
    first_wait_seconds: float = 0.1
    longest_wait_seconds: float = 5.0
    stalled_seconds: float = 15.0
    total_seconds: float = 60.0

    def wait_seconds(self, failures: int) -> float:
        """The wait after so many failures; random, so that clients do not come back together."""
        longest = min(self.first_wait_seconds * 2 ** (failures - 1), self.longest_wait_seconds)
        return longest * random.uniform(0.5, 1.0)


RETRY_POLICY = RetryPolicy()


class TransientError(Exception):
    """What another attempt may cure: a body that ended early, a hub that is overloaded."""


# Refusals to try again at once, and everything the server itself calls its own failure.
TRANSIENT_STATUS = {408, 429} | set(range(500, 600))
_STATUS = re.compile(r"status code: (\d{3})")
# What obstore calls a lost connection, a time limit, and a body that broke off.
_TRANSIENT_KIND = re.compile(r"\bkind: (Connect|Request|Timeout|Interrupted)\b")
_SOURCE = re.compile(r"\n+Debug source:.*", re.DOTALL)
_REQUEST = re.compile(r".*Error performing [A-Z]+ \S+ in \S+?( ?, after .*?)? +- ", re.DOTALL)
_USER = re.compile(r"://[^/@\s]*@")
_QUERY = re.compile(r"\?[^\s\"')]+")
_XML = re.compile(r"<Code>(?P<code>.*?)</Code>.*?<Message>(?P<message>.*?)</Message>", re.DOTALL)
_REASON = re.compile(r'(?:message|error): "([^"]+)"')  # the system's own words, deep inside
_MAX_CHARACTERS = 300  # of what a server says; error pages are longer


async def retry(
    attempt: Callable[[], Awaitable[T]],
    policy: RetryPolicy,
    explain: Callable[[str], StorageError],
) -> T:
    """Tries until it works, or until the failure is final or policy ends.

    Args:
      attempt: what is tried; may keep what it has got so far.
      policy: how often and how long.
      explain: makes the error for the last failure, of what the server said.

    Raises:
      StorageError: from `explain`.
    """
    begun, failures = time.monotonic(), 0
    while True:
        try:
            return await attempt()
        except Exception as error:
            failures += 1
            if isinstance(error, MtjLoaderError) or not is_transient(error):
                raise
            late = time.monotonic() - begun > policy.total_seconds
            if late or failures >= policy.attempts:
                seconds = time.monotonic() - begun
                tries = f"{failures} attempts in {seconds:.1f} s; the last: {said(error)}"
                raise explain(tries) from error
            await asyncio.sleep(policy.wait_seconds(failures))


def is_transient(error: BaseException) -> bool:
    """Whether the same request may work a moment later."""
    if isinstance(error, TransientError):
        return True
    status = status_of(error)
    if status is not None:
        return status in TRANSIENT_STATUS
    return _TRANSIENT_KIND.search(str(error)) is not None


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the server answered with, if it did."""
    match = _STATUS.search(str(error))
    return int(match[1]) if match else None


def said(error: BaseException) -> str:
    """What the server or the system said, without the URL: it may hold a signature."""
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
        line = f"{line}: no byte came within the time limit"
    return " ".join(line.split())[:_MAX_CHARACTERS]


def harmless(error: BaseException) -> BaseException:
    """A copy that may be kept and shown as the cause of another error.

    Without user names and queries of URLs, which may let anybody in. The original loses its frames,
    and so do those before it: they hold answers, and these hold connections.
    """
    following: BaseException | None = error
    while following is not None:
        following.__traceback__ = None
        following = following.__cause__ or following.__context__
    return type(error)(_QUERY.sub("?…", _USER.sub("://", str(error))))


def translated(error: Exception, file: str, key: str | None) -> MtjLoaderError:
    """Our error for a failure that another attempt would not cure.

    Args:
      error: what obstore raised.
      file: for people, the object's name.
      key: for people, the range of bytes.
    """
    found = said(error)
    if isinstance(error, FileNotFoundError):
        return CheckpointError("the file is missing", file=file, found=found)
    if status_of(error) == 404:
        return CheckpointError("the server knows no such place", file=file, found=found)
    if status_of(error) in (401, 403):
        hint = "check the credentials; some stores answer so to what is not there, too"
        return StorageError("the server refuses access", file=file, key=key, found=found, hint=hint)
    if "Range request not supported" in found:
        hint = "copy the checkpoint to this machine, or to a server that knows ranges"
        what = "the server does not answer requests for a part of a file"
        return StorageError(what, file=file, key=key, found=found, hint=hint)
    return StorageError("a request failed", file=file, key=key, found=found)
