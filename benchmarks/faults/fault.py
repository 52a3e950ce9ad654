"""What the groups of faults share: a fault, its outcome, and the processes it is tried on.

Every process gets a session of its own, so that whatever it leaves running can be found.
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
DEADLINE_SECONDS = 120  # more than JAX's own heartbeat takes; who is later than this hangs
_POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Outcome:
    """What came of a fault.

    Attributes:
      message: the first line of the error on stderr; the last line where none is called so.
      exit_codes: one for each process; negative: the signal that ended it, as subprocess has it.
      seconds: from the injection to the end of the last process.
      left_over: processes, threads and files that should not be there any more.
    """

    message: str
    exit_codes: tuple[int, ...]
    seconds: float
    left_over: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fault:
    """One fault, injected in one phase.

    Attributes:
      name: what happens, as `SIGTERM` or `file truncated`.
      phase: when, as `planning` or `streaming`.
      run: injects it; is given an empty folder that is removed afterwards.
    """

    name: str
    phase: str
    run: Callable[[Path], Outcome]


@dataclass(frozen=True)
class Running:
    """A process under observation; what it prints goes to files, which never fill up like pipes."""

    process: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path
    begun: float = field(default_factory=time.perf_counter)

    def wait_for(self, seen: Callable[[], object]) -> None:
        """Waits until something can be seen from outside.

        Raises:
          RuntimeError: the process ended before, or it never came.
        """
        deadline = time.perf_counter() + DEADLINE_SECONDS
        while not seen():
            if self.process.poll() is not None or time.perf_counter() > deadline:
                raise RuntimeError(f"the moment never came\n{self.stderr.read_text()}")
            time.sleep(_POLL_SECONDS)

    def printed(self, text: str) -> bool:
        """Whether this text is on stdout or stderr by now."""
        return any(text in file.read_text() for file in (self.stdout, self.stderr))


def start(
    scratch: Path,
    program: Sequence[object],
    *,
    environment: Mapping[str, str] | None = None,
    first: str = ":",
) -> Running:
    """Starts Python in a session of its own.

    Args:
      scratch: where its output goes.
      program: arguments of the interpreter: `["-m", "mtj_loader.cli", "load", …]`.
      environment: variables beside those of this process.
      first: what the shell does before: sets limits.
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
    return Running(process, stdout, stderr)


def command(scratch: Path, *arguments: object, **options: object) -> Running:
    """Starts `mtj-loader` with these arguments; options as for `start`."""
    return start(scratch, ["-m", "mtj_loader.cli", *arguments], **options)


def outcome(
    running: Sequence[Running], injected: float, left_over: Callable[[], Sequence[str]] = tuple
) -> Outcome:
    """Waits for all processes to end and says what came of it.

    Args:
      running: the processes; the message is that of the first that has one.
      injected: when, by `time.perf_counter`.
      left_over: looked at when all have ended: what is there beside processes.
    """
    deadline = injected + DEADLINE_SECONDS
    codes = tuple(_ended(one, deadline) for one in running)
    seconds = time.perf_counter() - injected
    found = [f"process {pid}" for one in running for pid in _session(one.process.pid)]
    lines = [line for one in running for line in one.stderr.read_text().splitlines()]
    errors = [line for line in lines if line.startswith("error:")]
    return Outcome((errors[:1] or lines[-1:] or [""])[0], codes, seconds, (*found, *left_over()))


def _ended(running: Running, deadline: float) -> int:
    """The exit code; a process that hangs is killed, which shows as -9."""
    try:
        return running.process.wait(max(0, deadline - time.perf_counter()))
    except subprocess.TimeoutExpired:
        running.process.kill()
        return running.process.wait()


def _session(leader: int) -> Iterator[int]:
    """The processes of a session that are still there."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = status.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it ended while we looked
            continue
        if int(session) == leader and state != "Z":
            yield int(status.parent.name)
