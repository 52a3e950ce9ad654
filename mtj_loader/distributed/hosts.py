"""The interface for the hosts of one load, its implementation for one host, and failure records.

Every host runs the same program. A phase ends on all hosts together. A failure on one host is
reported on every host. `host_group` has the implementation for several hosts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TypeVar

import jax

from mtj_loader.errors import INTERRUPTED, UNEXPECTED, HostError, MachineError, MtjLoaderError
from mtj_loader.names import escape

T = TypeVar("T")  # a pytree of arrays


@dataclass(frozen=True)
class Failure:
    """Why a load ends on all hosts: published by the first host to notice, read by the others.

    Attributes:
      message: what happened.
      host: where.
      exit_code: of the command line on that host.
    """

    message: str
    host: int
    exit_code: int = MachineError.exit_code

    @classmethod
    def from_error(cls, host: int, phase: str, error: BaseException) -> Failure:
        """The failure that the other hosts report when one host raises an error."""
        if isinstance(error, MtjLoaderError):
            return cls(f"host {host} failed in {phase!r}: {error}", host, error.exit_code)
        if isinstance(error, KeyboardInterrupt):
            return cls(f"host {host} was interrupted in {phase!r}", host, INTERRUPTED)
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else UNEXPECTED
            return cls(f"host {host} exited in {phase!r}", host, code)
        code = MachineError.exit_code if isinstance(error, MemoryError) else UNEXPECTED
        message = f"host {host} failed in {phase!r}: {type(error).__name__}: {escape(error)}"
        return cls(message, host, code)

    @classmethod
    def from_timeout(
        cls, missing: Sequence[int], phase: str, seconds: float, waiting: int
    ) -> Failure:
        """The failure when host `waiting` waited too long for the missing ones."""
        noun = "host" if len(missing) == 1 else "hosts"
        names = ", ".join(map(str, missing))
        message = f"{noun} {names} did not finish {phase!r} within {seconds:g} s of host {waiting}"
        return cls(message, missing[0])

    @classmethod
    def from_missed_heartbeats(cls, host: int, seconds: float) -> Failure:
        """The failure when process 0 receives no more heartbeats from a host."""
        causes = "its process died or is stopped, or the network is down"
        return cls(f"no heartbeat from host {host} for {seconds:g} s: {causes}", host)

    @classmethod
    def unpack(cls, packed: bytes) -> Failure:
        """The failure that `pack` serialized."""
        return cls(**json.loads(packed))

    def pack(self) -> bytes:
        """Serializes the failure for `unpack`."""
        return json.dumps(asdict(self)).encode()

    def error(self) -> HostError:
        """The exception to raise for it."""
        return HostError(self.message, host=self.host, exit_code=self.exit_code)


class Hosts:
    """The hosts of one load. This base class is the implementation for a single host.

    Attributes:
      index: this host; process 0 reads headers and prints.
      count: the number of hosts.
    """

    index = 0
    count = 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the load that ends on all hosts together.

        Args:
          name: the same on all hosts; messages quote it: `read`.

        Raises:
          HostError: another host failed, or did not reach the end in time.
        """
        yield

    def barrier(self, name: str) -> None:
        """Waits until all hosts have called this, each once and with the same name.

        Raises:
          HostError: another host failed, or did not reach the barrier in time.
        """

    def check(self) -> None:
        """Raises if another host has failed. Cheap; call it a few times a second while waiting.

        Raises:
          HostError: another host failed.
        """

    def wait_until_ready(self, arrays: T) -> T:
        """As `jax.block_until_ready`, for work that needs other hosts' devices.

        Raises:
          HostError: another host failed.
        """
        return jax.block_until_ready(arrays)

    def gather(self, name: str, value: bytes) -> list[bytes]:
        """Returns the values of all hosts on every host, in the order of the hosts.

        Raises:
          HostError: another host failed, or did not call this in time.
        """
        return [value]

    def broadcast(self, name: str, make: Callable[[], bytes]) -> bytes:
        """Returns on every host what `make` returns on process 0; only process 0 calls it.

        Raises:
          HostError: process 0 failed, or did not call this in time.
        """
        return make()

    def fail(self, failure: Failure) -> HostError:
        """Publishes why the load ends, unless a host has already; returns the published error."""
        return failure.error()


SINGLE_HOST = Hosts()
