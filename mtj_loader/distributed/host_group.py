"""Several hosts that run one load together, connected by a key-value store.

A thread on each host sends a heartbeat a few times a second and reads whether a host has failed.
All keys are under `mtj_loader/<load>/`:

  <phase>/<host>      the host has reached the end of the phase
  <phase>/all         all hosts have; written by process 0
  <name>/from <host>  a value that a host shares with all
  <name>/value        a value that process 0 shares with all
  <name>/written      process 0 has written that value
  heartbeat/<host>    a number that grows
  failed/reason       why the load ends, if it fails
  leave/<host>        the host knows about the failure
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

import jax
from jax.errors import JaxRuntimeError

from mtj_loader.distributed.hosts import SINGLE_HOST, Failure, Hosts, T
from mtj_loader.distributed.jax_runtime import find_runtime
from mtj_loader.distributed.key_value_store import (
    KeyValueStore,
    call_with_timeout,
    run_in_thread,
)
from mtj_loader.errors import HostError, UsageError

DEFAULT_TIMEOUT_SECONDS = 300.0  # a slow disk or a cold start may cost a host minutes, not more
HEARTBEAT_TIMEOUT_SECONDS = 10.0  # 40 intervals: a live host may compile, or swap for a while
_HEARTBEAT_SECONDS = 0.25
_POLL_SECONDS = 0.2  # between two checks for a failure of another host
_READY_POLL_SECONDS = 0.0002  # delay in noticing that a device has finished
_LEAVE_SECONDS = 3.0  # process 0 keeps the store alive so long, for others to read the failure
_REPORT_SECONDS = 0.5  # for publishing that a signal ends the process
_TERMINATION_SECONDS = 0.9  # a process that receives SIGTERM ends within a second
_DEVICE_POLL_SECONDS = 0.02  # a step takes less, or the delay does not matter

V = TypeVar("V")

_load_numbers = itertools.count()  # equal on all hosts, so that no key is used twice
_active: list[HostGroup] = []  # the load of this process, if it is one of several hosts


class HostGroup(Hosts):
    """See Hosts.

    Args:
      store: shared by all hosts.
      timeout_seconds: how long to wait for other hosts that are alive.
    """

    def __init__(self, store: KeyValueStore, timeout_seconds: float) -> None:
        self.index, self.count = store.index, store.count
        self._store, self._timeout_seconds = store, timeout_seconds
        self._number = next(_load_numbers)
        self._folder = f"mtj_loader/{self._number}"
        self._failure: HostError | None = None
        self._ended = threading.Event()

    @contextmanager
    def session(self) -> Iterator[None]:
        """Connects to the other hosts; disconnects at the end or after a failure.

        Raises:
          HostError: a host did not connect in time.
        """
        thread = threading.Thread(target=self._run_heartbeat, daemon=True, name="mtj_loader_hosts")
        thread.start()
        try:
            self.barrier("join")
            if self.index == 0 and self._number > 0:  # all hosts have left the previous load
                self._store.delete_folder(f"mtj_loader/{self._number - 1}")
            with self.phase("start of the devices"):
                run_in_thread(jax.devices, self.check)  # waits for the devices of all hosts
            yield
        except BaseException as error:
            self._leave(error.host if isinstance(error, HostError) else self.index)
            raise
        finally:
            self._ended.set()
            thread.join()

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
                self._wait_for_missing_host()
            self.fail(Failure.from_error(self.index, name, error))
            raise

    def barrier(self, name: str) -> None:
        """See Hosts."""
        self._store.set_once(self._key(name, self.index), b"here")
        deadline = time.monotonic() + self._timeout_seconds
        if self.index == 0:
            for host in range(self.count):
                self._wait_for_key(self._key(name, host), name, deadline)
            self._store.set_once(self._key(name, "all"), b"go")
        self._wait_for_key(self._key(name, "all"), name, deadline)

    def check(self) -> None:
        """See Hosts."""
        if self._failure is not None:
            raise self._failure

    def wait_until_ready(self, arrays: T) -> T:
        """See Hosts."""
        return wait_for_arrays(arrays, self.check)

    def gather(self, name: str, value: bytes) -> list[bytes]:
        """See Hosts."""
        self._store.put(self._key(name, f"from {self.index}"), value)
        self.barrier(name)
        return [self._store.get(self._key(name, f"from {host}")) for host in range(self.count)]

    def broadcast(self, name: str, make: Callable[[], bytes]) -> bytes:
        """See Hosts."""
        if self.index == 0:
            value = make()
            self._store.put(self._key(name, "value"), value)
            self._store.set_once(self._key(name, "written"), b"here")
            return value
        # Process 0 may need long, for example to download: no deadline while heartbeats arrive.
        self._wait_for_key(self._key(name, "written"), name, deadline=math.inf)
        return self._store.get(self._key(name, "value"))

    def fail(self, failure: Failure) -> HostError:
        """See Hosts."""
        reason = self._key("failed", "reason")
        try:
            self._store.set_once(reason, failure.pack())
            published = self._store.wait_for(reason, _POLL_SECONDS)
        except HostError as error:  # no host can be reached
            return error
        return failure.error() if published is None else Failure.unpack(published).error()

    def stop_heartbeat(self) -> None:
        """From now on, failures are not noticed any more."""
        self._ended.set()

    def _wait_for_key(self, key: str, name: str, deadline: float) -> None:
        """Waits for a key until the deadline, or until a host fails."""
        while self._store.wait_for(key, _POLL_SECONDS) is None:
            self.check()
            if time.monotonic() > deadline:
                present = self._list(name)
                missing = [host for host in range(self.count) if str(host) not in present]
                failure = Failure.from_timeout(
                    missing or [0], name, self._timeout_seconds, self.index
                )
                raise self.fail(failure)
        self.check()

    def _run_heartbeat(self) -> None:
        """Sends heartbeats and reads failures until the load ends on this host or on any."""
        last: dict[str, tuple[bytes, float]] = {}
        try:
            for beat in itertools.count():
                self._store.overwrite(self._key("heartbeat", self.index), b"%d" % beat)
                if self.index == 0:
                    self._check_heartbeats(last)
                for published in self._list("failed").values():
                    self._failure = Failure.unpack(published).error()
                if self._ended.wait(_HEARTBEAT_SECONDS) or self._failure is not None:
                    return
        except HostError as error:
            self._failure = error
        except Exception as error:  # noqa: BLE001 -- for example: no more threads can be started
            self._failure = Failure.from_error(self.index, "heartbeat", error).error()

    def _check_heartbeats(self, last: dict[str, tuple[bytes, float]]) -> None:
        """On process 0: publishes a failure if a host has sent no heartbeat for too long.

        Args:
          last: each host's last heartbeat and when it was first seen; updated.
        """
        now = time.monotonic()
        for host, beat in self._list("heartbeat").items():
            if host not in last or last[host][0] != beat:
                last[host] = beat, now
            elif now - last[host][1] > HEARTBEAT_TIMEOUT_SECONDS:
                self.fail(Failure.from_missed_heartbeats(int(host), HEARTBEAT_TIMEOUT_SECONDS))

    def _wait_for_missing_host(self) -> None:
        """After an error of JAX's runtime: waits until a missing host, the cause, is detected.

        Raises:
          HostError: a host is missing.
        """
        deadline = time.monotonic() + HEARTBEAT_TIMEOUT_SECONDS + 4 * _HEARTBEAT_SECONDS
        while time.monotonic() < deadline:
            self.check()
            time.sleep(_HEARTBEAT_SECONDS)

    def _leave(self, failed: int | None) -> None:
        """Leaves after a failure; process 0, which holds the store, waits for the others first.

        Args:
          failed: the host that failed; it knows, or it is gone.
        """
        deadline = time.monotonic() + _LEAVE_SECONDS
        with suppress(HostError, TimeoutError):  # the store is gone: no host can be reached
            leave = partial(self._store.set_once, self._key("leave", self.index), b"left")
            call_with_timeout(leave, _LEAVE_SECONDS if self.index == 0 else _POLL_SECONDS)
            while self.index == 0 and time.monotonic() < deadline:
                gone = {*self._list("leave"), str(failed)}
                if gone.issuperset(map(str, range(self.count))):
                    return
                time.sleep(_POLL_SECONDS)

    def _list(self, name: str) -> dict[str, bytes]:
        return self._store.list_folder(f"{self._folder}/{name}")

    def _key(self, name: str, part: object) -> str:
        return f"{self._folder}/{name}/{part}"


@contextmanager
def connect_hosts(timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> Iterator[Hosts]:
    """Connects all hosts of JAX's distributed runtime for one load; each must call this.

    Args:
      timeout_seconds: how long to wait for other hosts that are alive.

    Raises:
      UsageError: there are several processes, but `jax.distributed.initialize` was not called; or
        the timeout is not a positive, finite number.
      HostError: another host failed, died, or did not reach the end of a phase in time.
    """
    if not 0 < timeout_seconds < math.inf:
        what = "not a positive, finite number of seconds"
        raise UsageError(what, key="host_timeout", found=timeout_seconds)
    runtime = find_runtime()
    if runtime is None:
        yield SINGLE_HOST
        return
    hosts = HostGroup(KeyValueStore(*runtime), timeout_seconds)
    _active.append(hosts)
    try:
        with hosts.session():
            yield hosts
    finally:
        _active.remove(hosts)


def report_termination(exit_code: int) -> None:
    """Tells the other hosts of an active load that a signal ends this process; returns soon."""
    deadline = time.monotonic() + _TERMINATION_SECONDS
    for hosts in _active:
        hosts.stop_heartbeat()  # or this host would report its own termination as an error too
        failure = Failure(f"host {hosts.index} was terminated", hosts.index, exit_code)
        with suppress(TimeoutError):
            call_with_timeout(partial(hosts.fail, failure), _REPORT_SECONDS)
        if hosts.index == 0:  # the others read it from this process, so it must live a bit longer
            time.sleep(max(0.0, deadline - time.monotonic()))


def call_on_devices(call: Callable[[], V]) -> V:
    """Runs a call that may wait inside JAX for devices of other hosts.

    If this process is one of several connected hosts, it runs in a thread of its own, so that the
    failure of another host is noticed meanwhile.

    Raises:
      HostError: another host failed; the call may go on forever.
    """
    if not _active:
        return call()
    return run_in_thread(call, _active[-1].check, _DEVICE_POLL_SECONDS)


def wait_for_arrays(arrays: T, check: Callable[[], None]) -> T:
    """Waits for arrays as `jax.block_until_ready` does, calling `check` meanwhile."""
    while not all(leaf.is_ready() for leaf in jax.tree.leaves(arrays)):
        check()
        time.sleep(_READY_POLL_SECONDS)
    return jax.block_until_ready(arrays)
