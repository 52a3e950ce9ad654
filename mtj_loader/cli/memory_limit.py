"""Under a limit of the address space, a child does the work, and its parent explains how it ended.

Where Python raises an exception, the libraries below it abort the process, for example when XLA
cannot start a thread.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import sys

from mtj_loader.cli.child_process import fork, wait
from mtj_loader.errors import MachineError, MemoryLimitError, MtjLoaderError

# What native libraries, the dynamic linker and Python say if they get no memory or no thread,
# whose stack takes memory. After the first two, OpenBLAS exits, or sends itself SIGINT.
_NO_MEMORY = re.compile(
    "memory allocation|pthread_create|allocate memory|out of memory|MemoryError|bad_alloc"
    "|failed to map|start new thread|RESOURCE_EXHAUSTED",
    re.IGNORECASE,
)


def supervise_memory_limit() -> None:
    """Under a limit of the address space, continues in a child; its parent exits with it.

    Raises:
      MemoryLimitError: in the parent: the child ended because it got no memory.
      MachineError: in the parent: a signal killed the child for another reason.
    """
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit_bytes == resource.RLIM_INFINITY:
        return
    reader, writer = os.pipe()
    child = fork()
    if child == 0:
        os.close(reader)
        _redirect_stderr(writer)
        return
    os.close(writer)
    with open(reader, "rb") as pipe:  # noqa: PTH123 -- a pipe has no path
        stderr = pipe.read().decode(errors="replace")
    code = wait(child)
    if (error := explain_exit(code, stderr, limit_bytes)) is not None:
        raise error
    sys.stderr.write(stderr)
    sys.exit(code if code >= 0 else 128 - code)  # a signal, as shells report it


def explain_exit(code: int, stderr: str, limit_bytes: int) -> MtjLoaderError | None:
    """The error of a parent whose child ended under a limit, unless the child said why it ended.

    Args:
      code: the child's exit code, or minus the signal that killed it.
      stderr: what it printed.
      limit_bytes: of its address space.
    """
    if code == 0 or any(line.startswith("error: ") for line in stderr.splitlines()):
        return None
    lines = [line for line in stderr.splitlines() if not line.startswith(("Traceback", " "))]
    how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
    if reason := next(filter(_NO_MEMORY.search, lines), None):
        return MemoryLimitError(
            "the process exceeded the limit of its address space",
            expected="1 to 2 GB for JAX alone, more with many cores, plus the parameters",
            found=f"{limit_bytes:,} bytes ({how}: {reason})",
            hint="ulimit -v sets the limit",
        )
    if code > 0:
        return None
    return MachineError(
        f"the process was killed by {how}",
        found=lines[-1] if lines else None,
        hint=f"try it without the limit of the address space, {limit_bytes:,} bytes (ulimit -v)",
    )


def _redirect_stderr(pipe: int) -> None:
    """Redirects stderr, for libraries too. A new file object: the old one may assume a file."""
    os.dup2(pipe, 2)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
