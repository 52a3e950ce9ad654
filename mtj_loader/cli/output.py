"""Output of the commands: results go to stdout, everything else to stderr, colors to terminals."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterable

from rich.console import Console, RenderableType

from mtj_loader.display import as_text

_muted = threading.Event()
_STDOUT = 1  # the file descriptor that native libraries write to, whatever sys.stdout is


def print_json(document: object) -> None:
    """Prints one JSON document."""
    print(json.dumps(document, indent=2))


def print_table(renderable: RenderableType) -> None:
    """Prints a table: wrapped to fit a terminal, at full width anywhere else."""
    if sys.stdout.isatty():
        Console().print(renderable)
    else:
        print(as_text(renderable))


def reserve_stdout(*, muted: bool) -> None:
    """Sends what libraries print on stdout (their connection messages) to stderr from now on.

    Args:
      muted: also discard our own results and notes, because another process prints the same ones.
    """
    if muted:
        _muted.set()
    sys.stdout.flush()
    target = os.open(os.devnull, os.O_WRONLY) if muted else os.dup(_STDOUT)
    os.dup2(sys.stderr.fileno(), _STDOUT)
    sys.stdout = open(target, "w", errors="backslashreplace")  # noqa: PTH123, SIM115 -- stays open


def is_muted() -> bool:
    """Whether another process prints the results instead of this one."""
    return _muted.is_set()


def note(message: object) -> None:
    """Prints a message that is neither a result nor a warning to stderr."""
    if not is_muted():
        print(message, file=sys.stderr, flush=True)


def warn(warnings: Iterable[str]) -> None:
    """Prints warnings to stderr."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
