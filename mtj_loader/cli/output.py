"""Where output goes: results to stdout, all else to stderr; colors to terminals alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

from rich.console import Console, RenderableType

from mtj_loader.display import as_text


def print_json(document: object) -> None:
    """Prints one JSON document."""
    print(json.dumps(document, indent=2))


def print_table(renderable: RenderableType) -> None:
    """Prints a table: folded into a terminal, or in its full width where no person is watching."""
    if sys.stdout.isatty():
        Console().print(renderable)
    else:
        print(as_text(renderable))


def note(message: object) -> None:
    """Says something that is no result."""
    print(message, file=sys.stderr, flush=True)


def warn(warnings: Iterable[str]) -> None:
    """Says what was noticed and is no error."""
    for warning in warnings:
        note(f"warning: {warning}")
