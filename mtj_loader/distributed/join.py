"""Joining JAX's distributed runtime, with an error where JAX would abort the process or crash."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass

import jax
from jax.errors import JaxRuntimeError

from mtj_loader.distributed.key_value_store import call_with_timeout, first_line
from mtj_loader.errors import HostError, UsageError

HEARTBEAT_SECONDS = 30  # after so long without one JAX ends all hosts; ours says so after 10
_BACKSTOP_SECONDS = 60.0  # JAX aborts the process when it waits in vain; ours gives up before
_CONNECT_SECONDS = 5.0  # packets that a firewall drops are answered by nobody
_RETRY_SECONDS = 0.5
_LAST_PORT = 65535


@dataclass(frozen=True)
class Place:
    """Where this process stands among others.

    Attributes:
      coordinator: `host:port` where process 0 listens, reachable from all.
      processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      UsageError: one of them cannot be.
    """

    coordinator: str
    processes: int
    process_id: int

    def __post_init__(self) -> None:
        if not 0 <= self.process_id < self.processes:
            expected = f"0 to {self.processes - 1}, as there are {self.processes} processes"
            raise UsageError(
                "no such process", key="process id", expected=expected, found=self.process_id
            )
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) <= _LAST_PORT:
            raise UsageError(
                "cannot read the coordinator's address",
                expected="HOST:PORT, of process 0",
                found=repr(self.coordinator),
            )

    @property
    def address(self) -> tuple[str, int]:
        """The coordinator's name or number, and its port."""
        host, _, port = self.coordinator.rpartition(":")
        return host.removeprefix("[").removesuffix("]"), int(port)


def join(place: Place, seconds: float) -> None:
    """Meets the other processes; to be called before anything asks JAX for its devices.

    Args:
      place: this process's.
      seconds: how long to wait for the others.

    Raises:
      UsageError: JAX has its devices already.
      HostError: process 0 cannot listen, or not all came in time.
    """
    begun = time.monotonic()
    if place.process_id == 0:
        _check_port(place)
    else:
        _await_coordinator(place, seconds)
    left = max(1.0, seconds - (time.monotonic() - begun))
    try:
        call_with_timeout(lambda: _initialize(place, left), left)
    except TimeoutError as error:
        raise HostError(
            f"not all {place.processes} processes came to {place.coordinator} in {seconds:g} s",
            hint="each needs the same --coordinator and --processes, and a --process-id of its own",
        ) from error
    except JaxRuntimeError as error:
        raise HostError("cannot join the other processes", found=first_line(error)) from error
    except RuntimeError as error:
        raise UsageError("too late to join other processes", found=first_line(error)) from error


def join_pod(seconds: float) -> None:
    """Meets the other hosts of a Cloud TPU pod, which JAX knows; on a single host, nobody.

    Raises:
      HostError: not all came in time.
    """
    try:
        call_with_timeout(lambda: _initialize(None, seconds), seconds)
    except ValueError:  # no pod that JAX could find: this host is alone
        return
    except TimeoutError as error:
        what = f"not all hosts of this TPU pod came in {seconds:g} s"
        raise HostError(what, hint="start the same command on every host") from error
    except RuntimeError as error:
        raise HostError("cannot join the TPU pod", found=first_line(error)) from error


def _initialize(place: Place | None, seconds: float) -> None:
    # It would catch SIGTERM, to let a training job save its state; a load has none, and ends.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place and place.coordinator,
        place and place.processes,
        place and place.process_id,
        initialization_timeout=int(seconds + _BACKSTOP_SECONDS),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )


def _check_port(place: Place) -> None:
    """Process 0 listens on all addresses; JAX may crash where it cannot."""
    _, port = place.address
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        socket.create_server(
            ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6
        ).close()
    except OSError as error:
        raise HostError(
            f"process 0 cannot listen on port {port}",
            found=error.strerror,
            hint="another program has it: choose another port, on all hosts",
        ) from error


def _await_coordinator(place: Place, seconds: float) -> None:
    """Waits until somebody listens there; the name may become known later, too."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(place.address, timeout=_CONNECT_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostError(
                    f"nobody answers at {place.coordinator} for {seconds:g} s",
                    found=error.strerror or str(error),
                    hint="is process 0 running there, and does a firewall let its port through?",
                ) from error
        time.sleep(_RETRY_SECONDS)
