"""Options for commands that run on several hosts at once."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from mtj_loader.cli.output import reserve_stdout
from mtj_loader.cli.shared_options import Machine
from mtj_loader.cli.supervise import on_cloud_tpu
from mtj_loader.errors import UsageError

if TYPE_CHECKING:
    from mtj_loader.distributed.hosts import Hosts

_option = functools.partial(typer.Option, rich_help_panel="Several hosts")


@dataclass(frozen=True)
class Cluster:
    """The processes that work together; see docs/hosts.md."""

    coordinator: Annotated[
        str | None,
        _option(
            metavar="HOST:PORT",
            help="Where process 0 listens; a Cloud TPU pod needs none of these options.",
        ),
    ] = None
    processes: Annotated[
        int | None, _option(metavar="N", min=1, help="The number of processes.")
    ] = None
    process_id: Annotated[
        int | None, _option(metavar="I", min=0, help="This process, counted from 0.")
    ] = None
    host_timeout: Annotated[
        float, _option(metavar="SECONDS", min=1, help="How long to wait for hosts that are alive.")
    ] = 300

    def join(self, machine: Machine) -> dict[str, float]:
        """Prepares this host's devices and connects to the other hosts.

        Args:
          machine: the options of this host.

        Returns:
          The options that `mtj_loader.load` takes.

        Raises:
          UsageError: the options are incomplete, or JAX has started its devices already.
          HostError: the others did not connect in time.
        """
        machine.prepare()
        given = self.coordinator, self.processes, self.process_id
        if given == (None, None, None):
            if machine.cpu_devices is None and on_cloud_tpu():
                self._join_pod()
        elif given != (None, 1, None):  # a single process joins no others, even on a pod
            self._join_others()
        return {"host_timeout": self.host_timeout}

    def identity(self) -> dict[str, str | int | None]:
        """The three options that identify this process, by their command line names."""
        return {
            "--coordinator": self.coordinator,
            "--processes": self.processes,
            "--process-id": self.process_id,
        }

    def connect(self) -> AbstractContextManager[Hosts]:
        """Connects the hosts, so that each learns about failures of the others."""
        from mtj_loader.distributed.host_group import connect_hosts  # noqa: PLC0415 -- imports JAX

        return connect_hosts(self.host_timeout)

    def _join_pod(self) -> None:
        from mtj_loader.distributed.join import join_pod  # noqa: PLC0415 -- imports JAX

        join_pod(self.host_timeout)
        _prepare()

    def _join_others(self) -> None:
        if self.coordinator is None or self.processes is None or self.process_id is None:
            missing = ", ".join(name for name, value in self.identity().items() if value is None)
            raise UsageError("several hosts need all three options", found=f"no {missing}")
        from mtj_loader.distributed.join import ProcessConfig, join_processes  # noqa: PLC0415 -- imports JAX

        config = ProcessConfig(self.coordinator, self.processes, self.process_id)
        join_processes(config, self.host_timeout)
        _prepare()


def _prepare() -> None:
    """Has only process 0 print results, and a terminated process report to the others."""
    from mtj_loader.cli import signals  # noqa: PLC0415 -- imports JAX, as the next ones
    from mtj_loader.distributed.host_group import report_termination  # noqa: PLC0415
    from mtj_loader.distributed.jax_runtime import find_runtime  # noqa: PLC0415

    runtime = find_runtime()  # jax.process_index() would wait for all hosts' devices
    reserve_stdout(muted=runtime is not None and runtime.process_id != 0)
    signals.call_before_exit(report_termination)
