"""The key-value store shared by all processes of JAX's distributed runtime.

Process 0 holds the values. Every call has a time limit, even if that process is stopped and never
answers.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from jax.errors import JaxRuntimeError

from mtj_loader.errors import HostError

ANSWER_TIMEOUT_SECONDS = 10.0  # a call takes under a millisecond; a swapping host may take seconds
_POLL_SECONDS = 0.1

_T = TypeVar("_T")


@dataclass(frozen=True)
class KeyValueStore:
    """Maps strings to bytes, the same on all hosts. Keys are written once except by `overwrite`.

    Attributes:
      client: JAX's client; see `jax_runtime`.
      index: this process.
      count: the number of processes.
      unanswered: set when a call has timed out; all other waiting calls then fail too.
    """

    client: Any
    index: int
    count: int
    unanswered: threading.Event = field(default_factory=threading.Event)

    def put(self, key: str, value: bytes) -> None:
        """Writes a value of any size, compressed."""
        packed = zlib.compress(value, 1)
        self._call("key_value_set_bytes", key, packed)  # JAX lifts gRPC's limit of 4 MiB

    def get(self, key: str) -> bytes:
        """Reads a value that was written by `put` before this call."""
        packed = self.wait_for(key, ANSWER_TIMEOUT_SECONDS)
        if packed is None:
            raise no_answer()
        return zlib.decompress(packed)

    def set_once(self, key: str, value: bytes) -> None:
        """Writes a short value unless the key exists."""
        with suppress(JaxRuntimeError):  # `_call` raises it only if the key exists
            self._call("key_value_set_bytes", key, value)

    def overwrite(self, key: str, value: bytes) -> None:
        """Writes a short value, replacing the previous one."""
        self._call("key_value_set_bytes", key, value, True)

    def delete_folder(self, folder: str) -> None:
        """Removes all keys `folder/…`; later reads of them wait."""
        self._call("key_value_delete", folder)

    def wait_for(self, key: str, timeout_seconds: float) -> bytes | None:
        """Waits for a short value; None if there is none before the timeout."""
        milliseconds = max(1, int(timeout_seconds * 1000))  # the client enforces this by itself
        try:
            return self.client.blocking_key_value_get_bytes(key, milliseconds)
        except JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise _connection_lost(error) from error

    def list_folder(self, folder: str) -> dict[str, bytes]:
        """The short values of all keys `folder/…`, by the rest of the key."""
        found = self._call("key_value_dir_get_bytes", folder)
        return {key.removeprefix(f"{folder}/"): bytes(value) for key, value in found}

    def _call(self, method: str, *args: object) -> Any:  # noqa: ANN401 -- the client is untyped
        deadline = time.monotonic() + ANSWER_TIMEOUT_SECONDS

        def check() -> None:
            if self.unanswered.is_set() or time.monotonic() > deadline:
                self.unanswered.set()
                raise no_answer()

        try:
            return run_in_thread(lambda: getattr(self.client, method)(*args), check)
        except JaxRuntimeError as error:
            if "ALREADY_EXISTS" in str(error):
                raise
            raise _connection_lost(error) from error


def call_with_timeout(call: Callable[[], _T], seconds: float) -> _T:
    """Runs a call that may never return.

    Raises:
      TimeoutError: it did not return in time.
      Exception: whatever the call raised.
    """
    deadline = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() >= deadline:
            raise TimeoutError

    return run_in_thread(call, check, seconds)


def run_in_thread(
    call: Callable[[], _T], check: Callable[[], None], poll_seconds: float = _POLL_SECONDS
) -> _T:
    """Runs a call that may never return, and checks periodically whether to keep waiting.

    Args:
      call: runs in its own daemon thread, which is abandoned if `check` raises.
      check: raises an exception to stop waiting.
      poll_seconds: time between two calls of `check`.
    """
    outcome: list[Callable[[], _T]] = []

    def run() -> None:
        try:
            value = call()
        except BaseException as error:  # noqa: BLE001 -- raised again in the calling thread
            outcome.append(lambda error=error: _raise(error))
        else:
            outcome.append(lambda: value)

    thread = threading.Thread(target=run, daemon=True, name="mtj_loader_call")
    thread.start()
    while not outcome:
        thread.join(poll_seconds)
        if not outcome:
            check()
    return outcome[0]()


def _raise(error: BaseException) -> NoReturn:
    raise error


def no_answer() -> HostError:
    """The error for a store that does not answer."""
    return HostError(
        f"host 0 has not answered for {ANSWER_TIMEOUT_SECONDS:g} s: "
        "it is stopped, or the network is down",
        host=0,
    )


def _connection_lost(error: Exception) -> HostError:
    return HostError("the connection to host 0 is lost", host=0, found=first_line(error))


def first_line(error: Exception) -> str:
    """The first line of an error of JAX's runtime, without the remote call details after it."""
    return str(error).partition("\n")[0]
