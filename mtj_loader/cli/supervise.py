"""On several hosts, a child does the work, and a small parent reports how the child ended.

When a host dies, JAX's runtime aborts the others, and no Python code of theirs runs that could
report it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from mtj_loader.cli.child_process import SIGNALS, fork, wait
from mtj_loader.errors import INTERRUPTED, UNEXPECTED, HostError

_COORDINATOR, _PROCESS_ID = "--coordinator", "--process-id"
_COMMANDS = ("load", "generate")  # those that use devices
_TPU_CHIPS = ("accel[0-9]*", "vfio/[0-9]*")  # device files of v2 to v4, and of v5e and later

_CAUSES = {
    signal.SIGABRT: "JAX aborts every host when host 0 dies or another host does not answer",
    signal.SIGKILL: "it was killed by a user, or by the system when memory ran out",
}


@contextmanager
def supervise_host(arguments: Sequence[str] | None = None) -> Iterator[None]:
    """If the command line joins other hosts, continues in a child; its parent exits with it.

    Args:
      arguments: of the command line; by default the process's own.

    Raises:
      HostError: in the parent: a signal killed the child.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not joins_other_hosts(arguments):
        yield
        return
    _continue_in_child(_host_name(arguments))
    try:
        yield
    except SystemExit as error:
        if error.code:
            _exit_now(error.code)
        raise


def joins_other_hosts(arguments: Sequence[str]) -> bool:
    """Whether a command line joins other hosts: by its options, or on a TPU pod by default."""
    if any(one == _COORDINATOR or one.startswith(f"{_COORDINATOR}=") for one in arguments):
        return True
    return any(one in _COMMANDS for one in arguments[:1]) and on_cloud_tpu()


def on_cloud_tpu() -> bool:
    """Whether there are TPU chips and libtpu, and JAX is not set to use another platform."""
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    has_chips = any(True for pattern in _TPU_CHIPS for _ in Path("/dev").glob(pattern))
    return "tpu" in platforms.split(",") and has_chips and find_spec("libtpu") is not None


def host_killed(host: str, process: int, number: signal.Signals) -> HostError:
    """The error of a parent whose child a signal has killed."""
    return HostError(
        f"{host}: process {process} was killed by {number.name}",
        found=_CAUSES.get(number),
        hint="see the output of the other hosts",
    )


def _continue_in_child(host: str) -> None:
    """Returns in the child; the parent waits for it and exits."""
    child = fork(forwarded=SIGNALS)
    if child == 0:
        return
    code = wait(child)
    if code >= 0:
        os._exit(code)  # the child has printed and flushed everything
    if -code == signal.SIGINT:
        os._exit(INTERRUPTED)
    raise host_killed(host, child, signal.Signals(-code))


def _exit_now(code: object) -> NoReturn:
    """Exits without waiting for the other hosts, as JAX's runtime does at a normal exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else UNEXPECTED)


def _host_name(arguments: Sequence[str]) -> str:
    """This host's name in messages."""
    words = [part for one in arguments for part in one.split("=", 1)]
    after = words[words.index(_PROCESS_ID) + 1 :] if _PROCESS_ID in words else []
    return f"host {after[0]}" if after else "this host"
