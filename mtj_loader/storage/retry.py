"""Retries of requests: how many attempts are made, and for how long.

obstore does not retry here: it restarts a failed body only if the response has an etag, and its
time limit counts from the first byte of a large range.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from mtj_loader.errors import StorageError

T = TypeVar("T")

# Timeouts, throttling, and everything that the server calls its own failure.
TRANSIENT_STATUS = {408, 429} | set(range(500, 600))


class TransientError(Exception):
    """A failure that a retry may fix, such as a truncated body or an overloaded server."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long a failing request is retried.

    Attributes:
      attempts: for one request. With the default, the waits add up to about ten seconds; by then,
        object stores that throttle have scaled up.
      first_wait_seconds: before the second attempt; each further wait is twice as long.
      max_wait_seconds: upper bound of a wait.
      stalled_seconds: a connection that delivers nothing for this long has failed.
      total_seconds: no attempt starts later than this after the first.
    """

    attempts: int = 8
    first_wait_seconds: float = 0.1
    max_wait_seconds: float = 5.0
    stalled_seconds: float = 15.0
    total_seconds: float = 60.0

    def wait_seconds(self, failures: int) -> float:
        """The wait after this many failures; random, so that clients do not retry in step."""
        longest = min(self.first_wait_seconds * 2 ** (failures - 1), self.max_wait_seconds)
        return longest * random.uniform(0.5, 1.0)


RETRY_POLICY = RetryPolicy()


async def retry(
    attempt: Callable[[], Awaitable[T]],
    policy: RetryPolicy,
    explain: Callable[[str], StorageError],
) -> T:
    """Repeats an attempt while it raises TransientError.

    Args:
      attempt: may keep partial results between calls.
      policy: how often and how long.
      explain: makes the final error from a summary of the attempts.

    Raises:
      StorageError: from `explain`, after the last attempt.
      Exception: any other error of the attempt.
    """
    started, failures = time.monotonic(), 0
    while True:
        try:
            return await attempt()
        except TransientError as error:
            failures += 1
            seconds = time.monotonic() - started
            if failures >= policy.attempts or seconds > policy.total_seconds:
                summary = f"{failures} attempts in {seconds:.1f} s; the last: {error}"
                raise explain(summary) from error
            await asyncio.sleep(policy.wait_seconds(failures))
