"""The progress bar of a load: bytes, rate and time left, in a terminal or a notebook."""

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
    """Gives a function to call with the bytes done so far; `verb` says what is done with them.

    The bar goes to stderr, so that what a program prints stays clean, and only where a person can
    see it: a terminal, or a notebook.
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
