"""Ctrl-C, SIGTERM and SIGHUP: end the process at once, or raise where files must be removed.

Python runs its signal handlers between two instructions of the main thread, and so not while that
thread compiles, starts a device or waits for one, which may take minutes; and an exception raised
in the middle of native code is lost or aborts the process. A thread handles the signals instead.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from mtj_loader.errors import MachineError

# Printed for the user. Shells report such a process with exit code 128 plus the signal's number.
_MESSAGES: dict[int, str] = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "the terminal was closed",
}
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it

_raise_instead = threading.Event()
_exit_callbacks: list[Callable[[int], None]] = []


class Stopped(SystemExit):
    """A signal arrived after `raise_on_signal`; `except Exception` does not catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.message = _MESSAGES[number]


def exit_on_signal() -> None:
    """From now on a signal ends the process at once.

    A signal that the parent process ignores (`nohup`, shell scripts) stays ignored.

    Raises:
      MachineError: the system refuses a thread or a pipe.
    """
    try:
        reader, writer = os.pipe()
        threading.Thread(target=_exit_when_signaled, args=(reader,), daemon=True).start()
    except (OSError, RuntimeError) as error:
        what = "the system refuses a pipe or a thread"
        raise MachineError(
            what, found=str(error), hint="ulimit -n, -u and -v show the limits"
        ) from error
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _MESSAGES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def raise_on_signal() -> None:
    """From now on a signal raises Stopped in the main thread instead, so that files are removed."""
    _raise_instead.set()


def call_before_exit(callback: Callable[[int], None]) -> None:
    """Registers a quick callback, called with the exit code before a signal ends the process."""
    _exit_callbacks.append(callback)


def _handle(number: int, _: FrameType | None) -> None:
    if _raise_instead.is_set():
        raise Stopped(number)


def _exit_when_signaled(reader: int) -> None:
    """Waits for a signal and ends the process.

    Args:
      reader: the pipe to which Python's C code writes the number of each signal.
    """
    while (number := os.read(reader, 1)[0]) not in _MESSAGES or _raise_instead.is_set():
        pass
    prefix = _SHOW_CURSOR if os.isatty(2) else ""
    os.write(2, f"{prefix}{_MESSAGES[number]}\n".encode())
    try:
        for callback in _exit_callbacks:
            callback(128 + number)
    finally:
        os._exit(128 + number)
