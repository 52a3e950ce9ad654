"""The hosts of one load, as one of several sees them.

A thread on each host tells the others a few times a second that it is alive, and hears when one is
not. What hosts say to each other is in the store under `mtj_loader/<load>/`:

  <phase>/<host>   the host is at the end of the phase
  <phase>/all      all are; process 0 says so
  <name>/of <host> what a host shares with all
  beat/<host>      a number that grows
  failed/why       why the load ends, if it does
  leave/<host>     the host knows
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import jax
from jax.errors import JaxRuntimeError

from mtj_loader.distributed.host_failure import Failure, of_error, of_lateness, of_silence, unpack
from mtj_loader.distributed.hosts import Hosts, T, wait_for_arrays
from mtj_loader.distributed.key_value_store import (
    ANSWER_SECONDS,
    Store,
    call_with_timeout,
    run_in_thread,
    silent,
)
from mtj_loader.errors import HostError

SILENT_SECONDS = 10.0  # a live host beats 4 times a second, also while it compiles or swaps a bit
_BEAT_SECONDS = 0.25
_SLICE_SECONDS = 0.2  # of waiting, between two looks at whether another host failed
_LEAVE_SECONDS = 3.0  # process 0 keeps the store open so long, for others to read what failed

_numbers = itertools.count()  # every host counts its loads alike, so that no key is used twice


class ManyHosts(Hosts):
    """See Hosts.

    Args:
      store: shared by all.
      late_seconds: how long to wait for others that are alive.
    """

    def __init__(self, store: Store, late_seconds: float) -> None:
        self.index, self.count = store.index, store.count
        self._store, self._late_seconds = store, late_seconds
        self._number = next(_numbers)
        self._folder = f"mtj_loader/{self._number}"
        self._failure: HostError | None = None
        self._left = threading.Event()

    @contextmanager
    def session(self) -> Iterator[None]:
        """Joins the others; leaves them at the end, or when something failed.

        Raises:
          HostError: one did not come in time.
        """
        watcher = threading.Thread(target=self._watch, daemon=True, name="mtj_loader_hosts")
        watcher.start()
        try:
            self.barrier("join")
            if self.index == 0 and self._number > 0:  # all have left the load before
                self._store.forget(f"mtj_loader/{self._number - 1}")
            with self.phase("start of the devices"):
                run_in_thread(jax.devices, self.check)  # waits for those of all hosts
            yield
        except BaseException as error:
            self._see_others_off(error.host if isinstance(error, HostError) else self.index)
            raise
        finally:
            self._left.set()
            watcher.join()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """See Hosts."""
        try:
            yield
            self.barrier(name)
        except HostError:
            raise
        except BaseException as error:
            if any(isinstance(one, JaxRuntimeError) for one in (error, error.__cause__)):
                self._blame_the_missing()
            self.fail(of_error(self.index, name, error))
            raise

    def barrier(self, name: str) -> None:
        """See Hosts."""
        self._store.announce(self._key(name, self.index), b"here")
        deadline = time.monotonic() + self._late_seconds
        if self.index == 0:
            for host in range(self.count):
                self._await(self._key(name, host), name, deadline)
            self._store.announce(self._key(name, "all"), b"go")
        self._await(self._key(name, "all"), name, deadline)

    def check(self) -> None:
        """See Hosts."""
        if self._failure is not None:
            raise self._failure

    def wait_until_ready(self, arrays: T) -> T:
        """See Hosts."""
        return wait_for_arrays(arrays, self.check)

    def gather(self, name: str, value: bytes) -> list[bytes]:
        """See Hosts."""
        self._store.put(self._key(name, f"of {self.index}"), value)
        self.barrier(name)
        return [self._fetch(name, f"of {host}") for host in range(self.count)]

    def broadcast(self, name: str, make: Callable[[], bytes]) -> bytes:
        """See Hosts."""
        if self.index == 0:
            value = make()
            self._store.put(self._key(name, "value"), value)
            return value
        # It may take host 0 long, to download for example; while its heart beats, it is not late.
        self._await(self._key(name, "value"), name, deadline=math.inf)
        return self._fetch(name, "value")

    def fail(self, failure: Failure) -> HostError:
        """See Hosts."""
        why = self._key("failed", "why")
        try:
            self._store.announce(why, failure.pack())
            written = self._store.wait_for(why, _SLICE_SECONDS)
        except HostError as error:  # nobody can be told
            return error
        return failure.error() if written is None else unpack(written).error()

    def _fetch(self, name: str, part: str) -> bytes:
        self._await(self._key(name, part), name, time.monotonic() + self._late_seconds)
        value = self._store.get(self._key(name, part), ANSWER_SECONDS)
        if value is None:  # it was there: the connection is bad
            raise silent()
        return value

    def _await(self, key: str, name: str, deadline: float) -> None:
        """Waits for a key, but no longer than others live and the time allows."""
        while self._store.wait_for(key, _SLICE_SECONDS) is None:
            self.check()
            if time.monotonic() > deadline:
                here = self._listing(name)
                missing = [host for host in range(self.count) if str(host) not in here]
                late = of_lateness(missing or [0], name, self._late_seconds, self.index)
                raise self.fail(late)
        self.check()

    def _watch(self) -> None:
        """Beats, and listens, until the load ends on this host or on any."""
        heard: dict[str, tuple[bytes, float]] = {}
        try:
            for beat in itertools.count():
                self._store.overwrite(self._key("beat", self.index), b"%d" % beat)
                if self.index == 0:
                    self._listen(heard)
                for written in self._listing("failed").values():
                    self._failure = unpack(written).error()
                if self._left.wait(_BEAT_SECONDS) or self._failure is not None:
                    return
        except HostError as error:
            self._failure = error
        except Exception as error:  # noqa: BLE001 -- such as: no more threads; nobody is heard now
            self._failure = of_error(self.index, "watch", error).error()

    def _listen(self, heard: dict[str, tuple[bytes, float]]) -> None:
        """Process 0 hears everybody's heart, and says whose is silent."""
        now = time.monotonic()
        for host, beat in self._listing("beat").items():
            if host not in heard or heard[host][0] != beat:
                heard[host] = beat, now
            elif now - heard[host][1] > SILENT_SECONDS:
                self.fail(of_silence(int(host), SILENT_SECONDS))

    def _blame_the_missing(self) -> None:
        """After an error of the runtime: if another host is gone, that is why.

        Raises:
          HostError: it is.
        """
        deadline = time.monotonic() + SILENT_SECONDS + 4 * _BEAT_SECONDS
        while time.monotonic() < deadline:
            self.check()
            time.sleep(_BEAT_SECONDS)

    def _see_others_off(self, failed: int | None) -> None:
        """After a failure: process 0 stays until the others know of it, for it holds the store.

        Args:
          failed: the host that did; it knows, or is gone.
        """
        deadline = time.monotonic() + _LEAVE_SECONDS
        with suppress(HostError, TimeoutError):  # the store is gone, and nobody can be told
            bye = partial(self._store.announce, self._key("leave", self.index), b"bye")
            call_with_timeout(bye, _LEAVE_SECONDS if self.index == 0 else _SLICE_SECONDS)
            while self.index == 0 and time.monotonic() < deadline:
                gone = {*self._listing("leave"), str(failed)}
                if gone.issuperset(map(str, range(self.count))):
                    return
                time.sleep(_SLICE_SECONDS)

    def _listing(self, name: str) -> dict[str, bytes]:
        return self._store.listing(f"{self._folder}/{name}")

    def _key(self, name: str, part: object) -> str:
        return f"{self._folder}/{name}/{part}"
