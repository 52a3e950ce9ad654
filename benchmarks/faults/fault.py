"""What all groups of faults share: a fault, its outcome, and the processes it is injected into.

Every process gets its own session, so that processes that it leaves running can be found.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FIXTURE = Path("tests/data/shakespeare-neox").absolute()  # 8 MB, trained, with a tokenizer
DEADLINE_SECONDS = 120  # longer than JAX's heartbeat timeout; a process that takes longer hangs
_POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Outcome:
    """The outcome of a fault.

    Attributes:
      message: the first error line on stderr, or the last line if there is none.
      exit_codes: one per process; negative if a signal ended it, as in subprocess.
      seconds: from the injection to the end of the last process.
      left_over: processes, threads and files that should be gone.
    """

    message: str
    exit_codes: tuple[int, ...]
    seconds: float
    left_over: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fault:
    """One fault, injected in one phase.

    Attributes:
      name: what happens, for example `SIGTERM` or `file truncated`.
      phase: when it happens, for example `planning` or `streaming`.
      run: injects it; gets an empty folder that is removed afterwards.
    """

    name: str
    phase: str
    run: Callable[[Path], Outcome]


@dataclass(frozen=True)
class Process:
    """A running process; its output goes to files, which unlike pipes never block it."""

    process: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path
    started: float = field(default_factory=time.perf_counter)

    def wait_for(self, seen: Callable[[], object]) -> None:
        """Waits until `seen` returns true.

        Raises:
          RuntimeError: the process ended first, or the deadline passed.
        """
        deadline = time.perf_counter() + DEADLINE_SECONDS
        while not seen():
            if self.process.poll() is not None or time.perf_counter() > deadline:
                raise RuntimeError(f"the awaited event did not happen\n{self.stderr.read_text()}")
            time.sleep(_POLL_SECONDS)

    def printed(self, text: str) -> bool:
        """Whether this text is on stdout or stderr."""
        return any(text in file.read_text() for file in (self.stdout, self.stderr))


def start(
    scratch: Path,
    program: Sequence[object],
    *,
    environment: Mapping[str, str] | None = None,
    first: str = ":",
) -> Process:
    """Starts Python in its own session.

    Args:
      scratch: the folder for its output.
      program: arguments of the interpreter: `["-m", "mtj_loader.cli", "load", …]`.
      environment: variables in addition to those of this process.
      first: a shell command that runs first, to set limits.
    """
    number = len(list(scratch.glob("stdout-*")))
    stdout, stderr = scratch / f"stdout-{number}", scratch / f"stderr-{number}"
    with stdout.open("wb") as out, stderr.open("wb") as err:
        process = subprocess.Popen(
            ["sh", "-c", f'{first}; exec "$@"', "sh", sys.executable, *map(str, program)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | dict(environment or {}),
            start_new_session=True,
        )
    return Process(process, stdout, stderr)


def command(scratch: Path, *arguments: object, **options: object) -> Process:
    """Starts `mtj-loader` with these arguments; options as for `start`."""
    return start(scratch, ["-m", "mtj_loader.cli", *arguments], **options)


def outcome(
    running: Sequence[Process], injected: float, left_over: Callable[[], Sequence[str]] = tuple
) -> Outcome:
    """Waits for all processes to end and returns the outcome.

    Args:
      running: the processes; the message comes from the first that has one.
      injected: when the fault was injected, by `time.perf_counter`.
      left_over: called when all have ended; returns what is left besides processes.
    """
    deadline = injected + DEADLINE_SECONDS
    codes = tuple(_wait(one, deadline) for one in running)
    seconds = time.perf_counter() - injected
    found = [f"process {pid}" for one in running for pid in _session(one.process.pid)]
    lines = [line for one in running for line in one.stderr.read_text().splitlines()]
    errors = [line for line in lines if line.startswith("error:")]
    return Outcome((errors[:1] or lines[-1:] or [""])[0], codes, seconds, (*found, *left_over()))


def _wait(running: Process, deadline: float) -> int:
    """Returns the exit code; a process that hangs is killed and shows as -9."""
    try:
        return running.process.wait(max(0, deadline - time.perf_counter()))
    except subprocess.TimeoutExpired:
        running.process.kill()
        return running.process.wait()


def _session(leader: int) -> Iterator[int]:
    """The processes of a session that still exist."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = status.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # the process has ended
            continue
        if int(session) == leader and state != "Z":
            yield int(status.parent.name)
