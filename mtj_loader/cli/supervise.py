"""Small parent processes that report how the process doing the work ended.

On several hosts: when a host dies, JAX's runtime aborts the others, and no Python code of theirs
runs that could report it. Under a limit of the address space: where Python raises an exception,
the libraries below it abort the process, for example when XLA cannot start a thread. In both cases
a child does the work; the parent only forwards signals and waits.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from mtj_loader.errors import (
    INTERRUPTED,
    UNEXPECTED,
    HostError,
    MachineError,
    MemoryLimitError,
    MtjLoaderError,
)

_COORDINATOR, _PROCESS_ID = "--coordinator", "--process-id"
_COMMANDS = ("load", "generate")  # those that use devices
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# What native libraries, the dynamic linker and Python say if they get no memory or no thread,
# whose stack takes memory. After the first two, OpenBLAS exits, or sends itself SIGINT.
_NO_MEMORY = re.compile(
    "memory allocation|pthread_create|allocate memory|out of memory|MemoryError|bad_alloc"
    "|failed to map|start new thread|RESOURCE_EXHAUSTED",
    re.IGNORECASE,
)

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
    child = _fork()
    if child == 0:
        os.close(reader)
        _redirect_stderr(writer)
        return
    os.close(writer)
    with open(reader, "rb") as pipe:  # noqa: PTH123 -- a pipe has no path
        stderr = pipe.read().decode(errors="replace")
    code = _wait(child)
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
    child = _fork(forwarded=_SIGNALS)
    if child == 0:
        return
    code = _wait(child)
    if code >= 0:
        os._exit(code)  # the child has printed and flushed everything
    if -code == signal.SIGINT:
        os._exit(INTERRUPTED)
    raise host_killed(host, child, signal.Signals(-code))


def _fork(forwarded: Iterable[signal.Signals] = (signal.SIGTERM, signal.SIGHUP)) -> int:
    """Forks; the parent forwards signals to the child, and the child dies with its parent.

    A terminal sends Ctrl-C to parent and child, so by default the parent ignores it.

    Returns:
      As `os.fork`.
    """
    parent = os.getpid()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until the handlers are set
    try:
        child = os.fork()
        if child == 0:
            _die_with(parent)
            return 0
        for number in _SIGNALS:
            if number not in forwarded:
                signal.signal(number, signal.SIG_IGN)
            elif signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, _: os.kill(child, number))
        return child
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _wait(child: int) -> int:
    """The child's exit code once it has ended, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


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


def _die_with(parent: int) -> None:
    """Has the system kill this process when its parent is gone, even if this process is stuck.

    Only Linux can do this; TPU machines run Linux.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call
        os._exit(HostError.exit_code)


def _redirect_stderr(pipe: int) -> None:
    """Redirects stderr, for libraries too. A new file object: the old one may assume a file."""
    os.dup2(pipe, 2)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
