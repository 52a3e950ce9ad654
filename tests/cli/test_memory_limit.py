"""What the parent of a process under a limit of the address space reports."""

from __future__ import annotations

import signal

import pytest

from mtj_loader.cli.memory_limit import explain_exit
from mtj_loader.errors import MachineError, MemoryLimitError


@pytest.mark.parametrize(
    ("code", "stderr", "kind", "words"),
    [
        (0, "pthread_create failed", None, ""),
        (3, "warning: x\nerror: bad\n", None, ""),
        (1, "error: unexpected XlaRuntimeError: RESOURCE_EXHAUSTED\n", None, ""),
        (1, "thread '<unnamed>' panicked at src/lib.rs:1\nTraceback\n  x\nPanic: y\n", None, ""),
        (130, "interrupted\n", None, ""),
        (130, "BLAS: pthread_create failed\ninterrupted\n", MemoryLimitError, "code 130: BLAS"),
        (1, "Traceback …\n  x\nMemoryError\n", MemoryLimitError, "exit code 1: MemoryError"),
        (127, "x.so: failed to map segment\n", MemoryLimitError, "exit code 127: x.so"),
        (-signal.SIGABRT, "F1 pthread_create() failed.\n", MemoryLimitError, "SIGABRT: F1"),
        (
            -signal.SIGABRT,
            "thread panicked\n",
            MachineError,
            "killed by SIGABRT\n  found: thread p",
        ),
        (-signal.SIGKILL, "", MachineError, "killed by SIGKILL\n  hint: try it without the limit"),
    ],
)
def test_only_a_lack_of_memory_is_blamed_on_the_limit(
    code: int, stderr: str, kind: type | None, words: str
) -> None:
    error = explain_exit(code, stderr, 10**9)
    assert type(error) is (kind or type(None))
    assert words in str(error)
