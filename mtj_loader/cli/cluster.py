"""Options of commands that run on several hosts at once."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from mtj_loader.cli.options import Machine
from mtj_loader.cli.output import print_apart
from mtj_loader.cli.tpu import on_cloud_tpu
from mtj_loader.errors import UsageError

if TYPE_CHECKING:
    from mtj_loader.distributed.hosts import Hosts

_HOSTS = "Several hosts"


@dataclass(frozen=True)
class Cluster:
    """Which processes work together; docs/hosts.md."""

    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where process 0 listens; a Cloud TPU pod needs none of these options.",
            rich_help_panel=_HOSTS,
        ),
    ] = None
    processes: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="How many there are.", rich_help_panel=_HOSTS),
    ] = None
    process_id: Annotated[
        int | None,
        typer.Option(metavar="I", min=0, help="Which one this is.", rich_help_panel=_HOSTS),
    ] = None
    host_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="How long to wait for hosts that are late.",
            rich_help_panel=_HOSTS,
        ),
    ] = 300

    def join(self, machine: Machine) -> dict[str, float]:
        """Makes this host's devices and meets the other hosts.

        Args:
          machine: the options of this host.

        Returns:
          What `mtj_loader.load` takes of these options.

        Raises:
          UsageError: the options do not go together, or JAX has its devices already.
          HostError: the others did not come.
        """
        machine.prepare()
        given = self.coordinator, self.processes, self.process_id
        if given == (None, None, None):
            if machine.cpu_devices is None and on_cloud_tpu():
                self._join_pod()
        elif given != (None, 1, None):  # one process is just this one, on a pod too
            self._join_others()
        return {"host_timeout": self.host_timeout}

    def named(self) -> dict[str, str | int | None]:
        """The three options that name a process, as the command line spells them."""
        return {
            "--coordinator": self.coordinator,
            "--processes": self.processes,
            "--process-id": self.process_id,
        }

    def together(self) -> AbstractContextManager[Hosts]:
        """Work on all hosts that hears of the others, as `mtj_loader.load` does."""
        from mtj_loader.distributed.hosts import together  # noqa: PLC0415 -- brings JAX

        return together(self.host_timeout)

    def _join_pod(self) -> None:
        from mtj_loader.distributed.join import join_pod  # noqa: PLC0415 -- brings JAX

        join_pod(self.host_timeout)
        _prepare()

    def _join_others(self) -> None:
        if self.coordinator is None or self.processes is None or self.process_id is None:
            missing = ", ".join(name for name, value in self.named().items() if value is None)
            raise UsageError("several hosts need three options", found=f"no {missing}")
        from mtj_loader.distributed.join import Place, join  # noqa: PLC0415 -- brings JAX

        join(Place(self.coordinator, self.processes, self.process_id), self.host_timeout)
        _prepare()


def _prepare() -> None:
    """Results are printed once, and who is stopped tells the others."""
    from mtj_loader.cli import signals  # noqa: PLC0415 -- with JAX, as what follows
    from mtj_loader.distributed.hosts import tell_others  # noqa: PLC0415
    from mtj_loader.distributed.key_value_store import shared_store  # noqa: PLC0415

    store = shared_store()  # jax.process_index() would wait for all hosts' devices
    print_apart(muted=store is not None and store.index != 0)
    signals.before_end(tell_others)
