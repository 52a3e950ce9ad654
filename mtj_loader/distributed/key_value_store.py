"""The key-value store that all processes of JAX's distributed runtime share.

JAX has no public way to it: this is the one place that touches its private client. Values live in
process 0; every call is bounded in time, also where that process is stopped and never answers.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import jax
from jax.errors import JaxRuntimeError

from mtj_loader.errors import HostError, UsageError

ANSWER_SECONDS = 10.0  # a call takes under a millisecond; a host that swaps may take seconds
_CHUNK_BYTES = 1 << 20  # gRPC refuses messages of more than 4 MiB
_LOOK_SECONDS = 0.1
_LENGTH_BYTES = 4  # in front of a value: the number of its chunks

_T = TypeVar("_T")
Answer = Any  # of a client that has no types


@dataclass(frozen=True)
class Store:
    """Strings to bytes, the same on all hosts. A key is written once, unless it says otherwise.

    Attributes:
      client: JAX's.
      index: this process.
      count: how many there are.
      unanswered: set when a call waited in vain; all others that wait give up too.
    """

    client: Any
    index: int
    count: int
    unanswered: threading.Event = field(default_factory=threading.Event)

    def put(self, key: str, value: bytes) -> None:
        """Writes a value of any size; large ones are compressed and cut into chunks."""
        packed = zlib.compress(value, 1)
        starts = range(0, len(packed), _CHUNK_BYTES)
        for i, start in enumerate(starts):
            self._call("key_value_set_bytes", f"{key}/{i}", packed[start : start + _CHUNK_BYTES])
        self._call("key_value_set_bytes", key, len(starts).to_bytes(_LENGTH_BYTES, "little"))

    def get(self, key: str, seconds: float) -> bytes | None:
        """Waits for what `put` wrote; None if it is not there within so many seconds."""
        count = self.wait_for(key, seconds)
        if count is None:
            return None
        chunks = (self._chunk(f"{key}/{i}") for i in range(int.from_bytes(count, "little")))
        return zlib.decompress(b"".join(chunks))

    def announce(self, key: str, value: bytes) -> bool:
        """Writes a short value unless somebody wrote one before; says whether it did."""
        try:
            self._call("key_value_set_bytes", key, value)
        except JaxRuntimeError as error:
            if "ALREADY_EXISTS" in str(error):
                return False
            raise
        return True

    def overwrite(self, key: str, value: bytes) -> None:
        """Writes a short value over the one before."""
        self._call("key_value_set_bytes", key, value, True)

    def forget(self, folder: str) -> None:
        """Removes all keys `folder/…`; who asks for one later waits."""
        self._call("key_value_delete", folder)

    def wait_for(self, key: str, seconds: float) -> bytes | None:
        """Waits for a short value; None if it is not there within so many seconds."""
        milliseconds = max(1, int(seconds * 1000))  # kept by the client, also if nobody answers
        try:
            return self.client.blocking_key_value_get_bytes(key, milliseconds)
        except JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise _lost(error) from error

    def listing(self, folder: str) -> dict[str, bytes]:
        """The short values of all keys `folder/…`."""
        found = self._call("key_value_dir_get_bytes", folder)
        return {key.removeprefix(f"{folder}/"): bytes(value) for key, value in found}

    def _chunk(self, key: str) -> bytes:
        value = self.wait_for(key, ANSWER_SECONDS)
        if value is None:
            raise silent()
        return value

    def _call(self, method: str, *args: object) -> Answer:
        deadline = time.monotonic() + ANSWER_SECONDS

        def check() -> None:
            if self.unanswered.is_set() or time.monotonic() > deadline:
                self.unanswered.set()
                raise silent()

        try:
            return run_in_thread(lambda: getattr(self.client, method)(*args), check)
        except JaxRuntimeError as error:
            if "ALREADY_EXISTS" in str(error):
                raise
            raise _lost(error) from error


def shared_store() -> Store | None:
    """The store of this process's hosts; None where it is alone.

    Raises:
      UsageError: there are several processes, and nobody called `jax.distributed.initialize`.
    """
    if not jax.distributed.is_initialized():
        if (count := jax.process_count()) > 1:
            raise UsageError(
                f"{count} processes share these devices and cannot talk to each other",
                hint="call jax.distributed.initialize() before anything else asks for devices",
            )
        return None
    from jax._src import distributed  # noqa: PLC0415 -- private, and only needed with others

    # Not jax.process_count(), which starts the devices, and so waits for those of all other hosts.
    state = distributed.global_state
    if state.num_processes == 1:
        return None
    return Store(state.client, state.process_id, state.num_processes)


def call_with_timeout(call: Callable[[], _T], seconds: float) -> _T:
    """Runs a call that may never return.

    Raises:
      TimeoutError: it did not return in time.
      Exception: what the call raised.
    """
    deadline = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() >= deadline:
            raise TimeoutError

    return run_in_thread(call, check, seconds)


def run_in_thread(
    call: Callable[[], _T], check: Callable[[], None], every: float = _LOOK_SECONDS
) -> _T:
    """Runs a call that may never return, and looks meanwhile whether it should be waited for.

    Args:
      call: runs in a thread of its own, which is left behind if nobody waits for it any more.
      check: raises if so.
      every: seconds between two looks.
    """
    outcome: list[Callable[[], _T]] = []

    def run() -> None:
        try:
            value = call()
        except BaseException as error:  # noqa: BLE001 -- raised again where it belongs
            outcome.append(lambda error=error: _raise(error))
        else:
            outcome.append(lambda: value)

    thread = threading.Thread(target=run, daemon=True, name="mtj_loader_aside")
    thread.start()
    while not outcome:
        thread.join(every)
        if not outcome:
            check()
    return outcome[0]()


def _raise(error: BaseException) -> NoReturn:
    raise error


def silent() -> HostError:
    """What is said when the store does not answer."""
    return HostError(
        f"host 0 has not answered for {ANSWER_SECONDS:g} s: it is stopped, or the network is down",
        host=0,
    )


def _lost(error: Exception) -> HostError:
    return HostError("the connection to host 0 is lost", host=0, found=first_line(error))


def first_line(error: Exception) -> str:
    """What JAX's runtime says, without the remote calls behind it."""
    return str(error).partition("\n")[0]
