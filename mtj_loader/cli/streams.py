"""Standard streams: closed ones are replaced, and failed writes to stdout become errors."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mtj_loader.errors import MachineError, StorageError

# What shells report for a tool that the system ends because its reader, such as `head`, is gone.
CLOSED_PIPE = 128 + signal.SIGPIPE
_STDIN, _STDOUT, _STDERR = range(3)


def prepare_streams() -> None:
    """Makes printing safe: no closed streams, and no characters that cannot be encoded.

    A file that is opened later must not get the number of a closed stream: native code that prints
    would write into it.

    Raises:
      MachineError: stdout is closed, so that results would be lost.
    """
    closed = [number for number in (_STDIN, _STDOUT, _STDERR) if not _is_open(number)]
    for _ in closed:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 -- stays open
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if _STDOUT in closed:
        raise MachineError("stdout is closed", hint="redirect it to a file or to /dev/null")


@contextmanager
def writing_to_stdout() -> Iterator[None]:
    """Flushes stdout after the block.

    Raises:
      SystemExit: the reader has closed the pipe.
      StorageError: the write failed, for example because a disk is full.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()
        raise SystemExit(CLOSED_PIPE) from None
    except OSError as error:
        discard_stdout()
        what = "cannot write the output"
        raise StorageError(what, file="stdout", found=error.strerror) from error


def discard_stdout() -> None:
    """Discards what stdout still holds, so that Python's flush at exit does not fail again."""
    with contextlib.suppress(OSError):  # not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_to_stderr(text: str) -> None:
    """Prints a line at once; there is nowhere to report a failure."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
