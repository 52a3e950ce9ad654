"""Output for people: sizes with units, and tables as plain text or in color.

Text in tables is escaped, because names and values in files are untrusted input.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from mtj_loader.errors import UsageError
from mtj_loader.names import escape

_UNITS = {
    "": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30,
}  # fmt: skip
_MAX_SHOWN_CHARS = 200  # of a value in a message
_MAX_WIDTH = 100_000  # columns; no line is longer, so nothing is wrapped


def show_bytes(count: float) -> str:
    """A size for people: `2.83 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def parse_bytes(text: str | int) -> int:
    """Parses `"1GiB"`, `"500MB"` or a number of bytes.

    Raises:
      UsageError: the text is not a size.
    """
    found = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", str(text))
    if found is None or found[2].upper() not in _UNITS:
        raise UsageError("cannot read a size", expected='like "1GiB" or "500MB"', found=repr(text))
    return int(float(found[1]) * _UNITS[found[2].upper()])


def show_value(value: object) -> str:
    """An argument of the caller for a message: its repr, shortened."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer with too many digits, or deep nesting
        text = f"a value of type {type(value).__name__} that is too long to print"
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "…"


def counted(count: int, noun: str) -> str:
    """A number and its noun: `1 file`, `1,024 files`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def table(*headers: str) -> Table:
    """An empty table with a line below its header; the last column is right-aligned.

    Text that is too long for the terminal is wrapped, not truncated.
    """
    empty = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for header in headers[:-1]:
        empty.add_column(header, overflow="fold")
    empty.add_column(headers[-1], justify="right", no_wrap=True)
    return empty


def add_row(table: Table, *cells: str | Sequence[str], style: str | None = None) -> None:
    """Adds a row to a table; each cell is a line or several."""
    lines = ([cell] if isinstance(cell, str) else cell for cell in cells)
    table.add_row(*(Text("\n").join(map(line, each)) for each in lines), style=style)


def line(text: str, style: str = "") -> Text:
    """One line of text."""
    return Text(escape(text), style=style, overflow="fold")


def facts(named: dict[str, str]) -> Table:
    """Names and their values, one per line."""
    grid = Table.grid(padding=(0, 2))
    for name, value in named.items():
        grid.add_row(line(name, "bold"), line(value))
    return grid


def as_text(renderable: RenderableType) -> str:
    """Plain text without colors, as wide as needed: no name is truncated or wrapped."""
    file = io.StringIO()
    console = Console(
        file=file,
        width=_MAX_WIDTH,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
    )
    console.print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).strip("\n")
