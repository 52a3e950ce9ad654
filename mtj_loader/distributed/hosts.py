"""Many hosts, one load: they meet between phases, and what befalls one is said on all.

Every host runs the same program. A phase ends for all when it has ended on each; a host that fails
writes down why, and the others stop and say so; one that dies or is stopped is missed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import jax

from mtj_loader.distributed.host_failure import Failure
from mtj_loader.distributed.key_value_store import call_with_timeout, shared_store
from mtj_loader.errors import HostError, UsageError

T = TypeVar("T")  # a pytree of arrays

LATE_SECONDS = 300.0  # a slow disk or a cold start may cost a host minutes, not more
_TELL_SECONDS = 0.5  # who is told to stop stops within a second
_POLL_SECONDS = 0.0002  # how late the end of a device's work may be noticed

_under_way: list[Hosts] = []  # the load of this process, if it is one of several hosts


class Hosts:
    """The hosts of one load; here there is just one: nothing to wait for, and nothing to pay.

    Attributes:
      index: this host; process 0 is the one that reads headers and prints.
      count: how many there are.
    """

    index = 0
    count = 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the load that ends on all hosts together.

        Args:
          name: as messages have it, and the same on all hosts: `read`.

        Raises:
          HostError: another host failed meanwhile, or did not come to the end in time.
        """
        yield

    def barrier(self, name: str) -> None:
        """Waits until all hosts have called this, each once and with the same name.

        Raises:
          HostError: one failed, or did not come in time.
        """

    def check(self) -> None:
        """To be called a few times a second wherever a host waits; costs nothing.

        Raises:
          HostError: another host failed.
        """

    def wait_until_ready(self, arrays: T) -> T:
        """As `jax.block_until_ready`, for what needs other hosts' devices: one may have gone.

        Raises:
          HostError: another host failed.
        """
        return jax.block_until_ready(arrays)

    def gather(self, name: str, value: bytes) -> list[bytes]:
        """Everybody's value on every host, in the order of the hosts.

        Raises:
          HostError: one failed, or did not come in time.
        """
        return [value]

    def broadcast(self, name: str, make: Callable[[], bytes]) -> bytes:
        """What `make` gives on process 0, on every host; the others do not call it.

        Raises:
          HostError: process 0 failed, or did not come in time.
        """
        return make()

    def fail(self, failure: Failure) -> HostError:
        """Tells the other hosts why the load ends, if nobody did; returns what they know."""
        return failure.error()


ALONE = Hosts()


@contextmanager
def together(late_seconds: float = LATE_SECONDS) -> Iterator[Hosts]:
    """One load on all hosts of JAX's distributed runtime; every one of them must call this.

    Args:
      late_seconds: how long to wait for others that are alive.

    Raises:
      UsageError: there are several processes, and nobody called `jax.distributed.initialize`; or
        such a time cannot be waited.
      HostError: another host failed, died or did not come in time.
    """
    if not 0 < late_seconds < math.inf:
        raise UsageError("not a time to wait", key="host_timeout", found=late_seconds)
    store = shared_store()
    if store is None:
        yield ALONE
        return
    from mtj_loader.distributed.many_hosts import ManyHosts  # noqa: PLC0415 -- a kind of Hosts

    hosts = ManyHosts(store, late_seconds)
    _under_way.append(hosts)
    try:
        with hosts.session():
            yield hosts
    finally:
        _under_way.remove(hosts)


def tell_others(exit_code: int) -> None:
    """Tells the other hosts of a load under way that a signal ends this one; takes no time."""
    for hosts in _under_way:
        failure = Failure(f"host {hosts.index} was told to stop", hosts.index, exit_code)
        with suppress(TimeoutError):
            call_with_timeout(
                lambda hosts=hosts, failure=failure: hosts.fail(failure), _TELL_SECONDS
            )
        if hosts.index == 0:  # the others read it in this process, and would not find it any more
            time.sleep(_TELL_SECONDS)


def wait_for_arrays(arrays: T, check: Callable[[], None]) -> T:
    """Waits for arrays as `jax.block_until_ready` does, calling `check` meanwhile."""
    while not all(leaf.is_ready() for leaf in jax.tree.leaves(arrays)):
        check()
        time.sleep(_POLL_SECONDS)
    return jax.block_until_ready(arrays)
