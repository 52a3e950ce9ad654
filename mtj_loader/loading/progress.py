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
def progress_bar(total_bytes: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the bytes done so far.

    The bar goes to stderr, so that what a program prints stays clean, and only where a person can
    see it: a terminal, or a notebook.
    """
    console = Console(stderr=True)
    if not shown or not (console.is_terminal or console.is_jupyter):
        yield lambda done: None
        return
    columns = (
        TextColumn("loading"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("load", total=total_bytes)
        yield lambda done: progress.update(task, completed=done)
