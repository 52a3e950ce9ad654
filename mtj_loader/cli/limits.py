"""Under a limit of address space a child does the work, and this process says how it ended.

Where Python raises an exception, the libraries below it abort the process: a thread of XLA's or a
buffer of OpenBLAS that cannot be had. Nothing inside the process can turn that into an error.
"""

from __future__ import annotations

import os
import resource
import signal
import sys

from mtj_loader.cli.supervise import die_with, signals_held
from mtj_loader.errors import UNEXPECTED, MemoryLimitError

# Of Python after a traceback, and of the dynamic linker where it cannot map a library.
_NOT_OURS = (UNEXPECTED, 127)


def guard() -> None:
    """Returns in a process that does the work; where that is a child, its parent exits with it.

    Raises:
      MemoryLimitError: in the parent: the work ended as no work of ours does.
    """
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit_bytes == resource.RLIM_INFINITY:
        return
    reader, writer = os.pipe()
    parent = os.getpid()
    with signals_held():
        child = os.fork()
        if child == 0:
            die_with(parent)
            os.close(reader)
            _write_errors_to(writer)
            return
        os.close(writer)
        _forward_signals(child)
    with open(reader, "rb") as pipe:  # noqa: PTH123 -- a pipe has no path
        said = pipe.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0 or (code in _NOT_OURS and not said.startswith("error:")):
        raise _ended(limit_bytes, code, said)
    sys.stderr.write(said)
    sys.exit(code)


def _write_errors_to(pipe: int) -> None:
    """Also those of libraries. A new file object: the old one may believe that it can seek."""
    os.dup2(pipe, 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 -- for good


def _forward_signals(child: int) -> None:
    """Ctrl-C reaches the whole group of processes; what was sent to this one alone is passed on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(child, number))


def _ended(limit_bytes: int, code: int, said: str) -> MemoryLimitError:
    how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
    lines = (line for line in said.splitlines() if not line.startswith(("Traceback", " ")))
    return MemoryLimitError(
        "the limit of address space ended the work",
        expected="JAX alone reserves 1 to 2 GB, more with many cores; then come the parameters",
        found=f"{limit_bytes:,} bytes ({how}: {next(lines, 'no word')})",
        hint="ulimit -v sets the limit",
    )
