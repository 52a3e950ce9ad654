"""On several hosts a small parent watches the process that does the work, and says how it ended.

When a host dies, JAX's runtime aborts the others where they stand: no Python code runs any more
that could say so. The parent does, on every host. It holds nothing and does nothing else.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from mtj_loader.cli.tpu import on_cloud_tpu
from mtj_loader.errors import INTERRUPTED, UNEXPECTED, HostError

_COORDINATOR, _PROCESS_ID = "--coordinator", "--process-id"
_COMMANDS = ("load", "generate")  # those that use devices
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_CAUSES = {
    signal.SIGABRT: "JAX ends every host so when host 0 died, or when another host did not answer",
    signal.SIGKILL: "somebody killed it, or the system ran out of memory",
}


@contextmanager
def supervised(arguments: Sequence[str] | None = None) -> Iterator[None]:
    """Where the command line joins other hosts, a child goes on and its parent exits with it.

    Args:
      arguments: of the command line; by default the process's own.

    Raises:
      HostError: in the parent: a signal ended the work.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not is_one_of_many(given):
        yield
        return
    _become_child(_host(given))
    try:
        yield
    except SystemExit as error:
        if error.code:
            _leave(error.code)
        raise


def _become_child(host: str) -> None:
    """Returns in the child; the parent forwards signals until it ends, and then exits."""
    parent = os.getpid()
    with signals_held():
        child = os.fork()
        if child == 0:
            die_with(parent)
            return
        for number in _FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, _: os.kill(child, number))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code >= 0:
        os._exit(code)  # the child has said and flushed everything
    if -code == signal.SIGINT:
        os._exit(INTERRUPTED)
    raise ended(host, child, signal.Signals(-code))


@contextmanager
def signals_held() -> Iterator[None]:
    """What comes between a fork and its parent's readiness to forward signals waits for that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave(code: object) -> NoReturn:
    """Exits without waiting for the other hosts, as JAX's runtime does at a usual exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else UNEXPECTED)


def is_one_of_many(arguments: Sequence[str]) -> bool:
    """Whether a command line joins other hosts: because it says so, or because a TPU pod does."""
    if any(one == _COORDINATOR or one.startswith(f"{_COORDINATOR}=") for one in arguments):
        return True
    return any(one in _COMMANDS for one in arguments[:1]) and on_cloud_tpu()


def ended(host: str, process: int, number: signal.Signals) -> HostError:
    """What the parent says of a child that a signal ended."""
    return HostError(
        f"{host}: process {process} was ended by {number.name}",
        found=_CAUSES.get(number),
        hint="the other hosts' output says more",
    )


def _host(arguments: Sequence[str]) -> str:
    """This host's name in messages."""
    spread = [part for one in arguments for part in one.split("=", 1)]
    after = spread[spread.index(_PROCESS_ID) + 1 :] if _PROCESS_ID in spread else []
    return f"host {after[0]}" if after else "this host"


def die_with(parent: int) -> None:
    """The system kills this process when its parent is gone, be it stopped or stuck.

    Only Linux can; TPU machines run nothing else.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the system knew
        os._exit(HostError.exit_code)
