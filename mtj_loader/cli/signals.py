"""Ctrl-C and its like end the process at once, or in order where there are files to be removed.

Python calls its own handlers between two instructions of the main thread, and so not while that
compiles, starts a device or waits for one, which may take minutes; and an exception raised amid
native code is lost or aborts the process. A thread that the signal reaches all the same ends it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from mtj_loader.errors import MachineError

# What the user reads. Shells report a process that such a signal ended as 128 and its number.
_WORDS: dict[int, str] = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "the terminal is gone",
}
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it

_in_order = threading.Event()
_before: list[Callable[[int], None]] = []


class Stopped(SystemExit):
    """A signal asked for an end in order; passes every `finally` and every `except Exception`."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.word = _WORDS[number]


def watch() -> None:
    """From now on a signal ends the process at once.

    One that was to be ignored, as `nohup` and shell scripts have it, still is.

    Raises:
      MachineError: the system gives no more threads or files.
    """
    try:
        reader, writer = os.pipe()
        threading.Thread(target=_end, args=(reader,), daemon=True).start()
    except (OSError, RuntimeError) as error:
        what = "the system refuses a pipe or a thread"
        raise MachineError(
            what, found=str(error), hint="ulimit -n, -u and -v say what is allowed"
        ) from error
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def end_in_order() -> None:
    """From now on a signal raises Stopped in the main thread instead."""
    _in_order.set()


def before_end(call: Callable[[int], None]) -> None:
    """Has this called, with the exit code, before a signal ends the process; it must be quick."""
    _before.append(call)


def _stop(number: int, _: FrameType | None) -> None:
    if _in_order.is_set():
        raise Stopped(number)


def _end(reader: int) -> None:
    """Waits for a signal.

    Args:
      reader: where Python's C code writes the number of each, whatever the main thread does.
    """
    while (number := os.read(reader, 1)[0]) not in _WORDS or _in_order.is_set():
        pass
    before = _SHOW_CURSOR if os.isatty(2) else ""
    os.write(2, f"{before}{_WORDS[number]}\n".encode())
    try:
        for call in _before:
            call(128 + number)
    finally:
        os._exit(128 + number)
