"""Child processes that do the work of the command line; the parent forwards signals and waits."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterable

from mtj_loader.errors import MachineError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def fork(forwarded: Iterable[signal.Signals] = (signal.SIGTERM, signal.SIGHUP)) -> int:
    """Forks; the parent forwards signals to the child, and the child dies with its parent.

    A terminal sends Ctrl-C to parent and child, so by default the parent ignores it.

    Returns:
      As `os.fork`.
    """
    parent = os.getpid()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the handlers are set
    try:
        child = os.fork()
        if child == 0:
            _die_with(parent)
            return 0
        for number in SIGNALS:
            if number not in forwarded:
                signal.signal(number, signal.SIG_IGN)
            elif signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, _: os.kill(child, number))
        return child
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def wait(child: int) -> int:
    """The child's exit code once it has ended, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _die_with(parent: int) -> None:
    """Has the system kill this process when its parent is gone, even if this process is stuck.

    Only Linux can do this; TPU machines run Linux.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call
        os._exit(MachineError.exit_code)
