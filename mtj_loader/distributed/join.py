"""Connects to JAX's distributed runtime, with errors where JAX would abort or crash the process."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass

import jax
from jax.errors import JaxRuntimeError

from mtj_loader.distributed.key_value_store import call_with_timeout, first_line
from mtj_loader.errors import HostError, UsageError

HEARTBEAT_SECONDS = 30  # JAX then ends all hosts; ours reports a missing heartbeat after 10
_JAX_EXTRA_SECONDS = 60.0  # JAX aborts the process on its timeout; ours must come first
_CONNECT_SECONDS = 5.0  # a firewall may drop packets without an answer
_RETRY_SECONDS = 0.5
_MAX_PORT = 65535


@dataclass(frozen=True)
class ProcessConfig:
    """Which process of how many this is, and where process 0 listens.

    Attributes:
      coordinator: `host:port` where process 0 listens, reachable from all.
      processes: the number of processes.
      process_id: this process, from 0.

    Raises:
      UsageError: an invalid value.
    """

    coordinator: str
    processes: int
    process_id: int

    def __post_init__(self) -> None:
        if not 0 <= self.process_id < self.processes:
            expected = f"0 to {self.processes - 1}, for {self.processes} processes"
            raise UsageError(
                "invalid process id", key="process id", expected=expected, found=self.process_id
            )
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) <= _MAX_PORT:
            raise UsageError(
                "invalid coordinator address",
                expected="HOST:PORT, of process 0",
                found=repr(self.coordinator),
            )

    @property
    def address(self) -> tuple[str, int]:
        """The coordinator's host name or IP address, and its port."""
        host, _, port = self.coordinator.rpartition(":")
        return host.removeprefix("[").removesuffix("]"), int(port)


def join_processes(config: ProcessConfig, timeout_seconds: float) -> None:
    """Connects to the other processes. Call this before anything asks JAX for its devices.

    Args:
      config: of this process.
      timeout_seconds: how long to wait for the others.

    Raises:
      UsageError: JAX has started its devices already.
      HostError: process 0 cannot listen, or not all processes connected in time.
    """
    start = time.monotonic()
    if config.process_id == 0:
        _check_port(config)
    else:
        _wait_for_coordinator(config, timeout_seconds)
    left = max(1.0, timeout_seconds - (time.monotonic() - start))
    try:
        call_with_timeout(lambda: _initialize(config, left), left)
    except TimeoutError as error:
        raise HostError(
            f"not all {config.processes} processes connected to {config.coordinator} "
            f"within {timeout_seconds:g} s",
            hint="each needs the same --coordinator and --processes, and its own --process-id",
        ) from error
    except JaxRuntimeError as error:
        raise HostError("cannot connect to the other processes", found=first_line(error)) from error
    except RuntimeError as error:
        raise UsageError(
            "too late to connect to other processes", found=first_line(error)
        ) from error


def join_pod(timeout_seconds: float) -> None:
    """Connects to the other hosts of a Cloud TPU pod, which JAX finds by itself.

    Does nothing on a single host.

    Raises:
      HostError: not all hosts connected in time.
    """
    try:
        call_with_timeout(lambda: _initialize(None, timeout_seconds), timeout_seconds)
    except ValueError:  # JAX found no pod: this is the only host
        return
    except TimeoutError as error:
        what = f"not all hosts of this TPU pod connected within {timeout_seconds:g} s"
        raise HostError(what, hint="start the same command on every host") from error
    except RuntimeError as error:
        raise HostError("cannot connect to the TPU pod", found=first_line(error)) from error


def _initialize(config: ProcessConfig | None, timeout_seconds: float) -> None:
    # The preemption service catches SIGTERM so that a training job can save its state; we just end.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        config and config.coordinator,
        config and config.processes,
        config and config.process_id,
        initialization_timeout=int(timeout_seconds + _JAX_EXTRA_SECONDS),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )


def _check_port(config: ProcessConfig) -> None:
    """Checks that process 0 can listen on its port; JAX may crash otherwise."""
    _, port = config.address
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        socket.create_server(
            ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6
        ).close()
    except OSError as error:
        raise HostError(
            f"process 0 cannot listen on port {port}",
            found=error.strerror,
            hint="another program uses it: choose another port, on all hosts",
        ) from error


def _wait_for_coordinator(config: ProcessConfig, timeout_seconds: float) -> None:
    """Waits until process 0 listens; its host name may become resolvable later, too."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection(config.address, timeout=_CONNECT_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostError(
                    f"no answer at {config.coordinator} for {timeout_seconds:g} s",
                    found=error.strerror or str(error),
                    hint="check that process 0 runs there and that no firewall blocks its port",
                ) from error
        time.sleep(_RETRY_SECONDS)
