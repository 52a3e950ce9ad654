"""Output of the commands: results go to stdout, everything else to stderr, colors to terminals.

Commands print only with these functions. They escape what would control the terminal; text that
contains names or values of files is also escaped where it is composed, including line breaks.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import unicodedata
from collections.abc import Iterable

from rich.console import Console, RenderableType

from mtj_loader.cli.streams import print_to_stderr, writing_to_stdout
from mtj_loader.display import as_text
from mtj_loader.names import escape, escape_lines

_muted = threading.Event()
_STDOUT = 1  # the file descriptor that native libraries write to, whatever sys.stdout is


def print_json(document: object) -> None:
    """Prints one JSON document."""
    with writing_to_stdout():
        print(json.dumps(document, indent=2))


def print_lines(text: object) -> None:
    """Prints lines of a result."""
    with writing_to_stdout():
        print(escape_lines(text))


def print_table(renderable: RenderableType) -> None:
    """Prints a table of `display`: wrapped to fit a terminal, at full width anywhere else."""
    with writing_to_stdout():
        if sys.stdout.isatty():
            Console().print(renderable)
        else:
            print(as_text(renderable))


def print_generated(text: str, end: str = "") -> None:
    """Prints text of a model at once: as it is, but a terminal gets no control characters."""
    with writing_to_stdout():
        if sys.stdout.isatty():
            text = "".join(escape(c) if _controls_terminal(c) else c for c in text)
        print(text, end=end)


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
        print_to_stderr(escape_lines(message))


def print_remarks(notes: Iterable[str], warnings: Iterable[str]) -> None:
    """Prints notes and warnings to stderr, each in one line."""
    for text in notes:
        note(f"note: {escape(text)}")
    warn(warnings)


def warn(warnings: Iterable[str]) -> None:
    """Prints warnings to stderr, each in one line."""
    for warning in warnings:
        print_to_stderr(f"warning: {escape(warning)}")


def _controls_terminal(character: str) -> bool:
    return unicodedata.category(character) == "Cc" and character not in "\n\t"
