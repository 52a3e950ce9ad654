"""Where output goes: results to stdout, all else to stderr; colors to terminals alone."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterable

from rich.console import Console, RenderableType

from mtj_loader.display import as_text

_muted = threading.Event()
_STDOUT = 1  # the number that libraries write to, whatever Python's sys.stdout is


def print_json(document: object) -> None:
    """Prints one JSON document."""
    print(json.dumps(document, indent=2))


def print_table(renderable: RenderableType) -> None:
    """Prints a table: folded into a terminal, or in its full width where no person is watching."""
    if sys.stdout.isatty():
        Console().print(renderable)
    else:
        print(as_text(renderable))


def print_apart(*, muted: bool) -> None:
    """From now on only our results go to stdout: libraries say there who they are connected to.

    Args:
      muted: nor do ours, and notes go nowhere either, as another process prints the same.
    """
    if muted:
        _muted.set()
    sys.stdout.flush()
    target = os.open(os.devnull, os.O_WRONLY) if muted else os.dup(_STDOUT)
    os.dup2(sys.stderr.fileno(), _STDOUT)
    sys.stdout = open(target, "w", errors="backslashreplace")  # noqa: PTH123, SIM115 -- for good


def is_muted() -> bool:
    """Whether another process prints what this one would."""
    return _muted.is_set()


def note(message: object) -> None:
    """Says something that is neither a result nor a warning."""
    if not is_muted():
        print(message, file=sys.stderr, flush=True)


def warn(warnings: Iterable[str]) -> None:
    """Says what was noticed and is no error."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
