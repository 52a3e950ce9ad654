"""The progress bar of loads and conversions: bytes, rate and time left.

It is a module of its own because conversions use it, which do not import JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def progress_bar(
    total_bytes: int, *, shown: bool, verb: str = "loading"
) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of bytes done so far.

    The bar is written to stderr, so that a program's output stays clean, and only in a terminal or
    a notebook.

    Args:
      total_bytes: when the bar is full.
      shown: False shows no bar anywhere.
      verb: what is done with the bytes.
    """
    console = Console(stderr=True)
    if not shown or not (console.is_terminal or console.is_jupyter):
        yield lambda done: None
        return
    columns = (
        TextColumn(verb),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(verb, total=total_bytes)
        yield lambda done: progress.update(task, completed=done)
