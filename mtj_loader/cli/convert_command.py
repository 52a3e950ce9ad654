"""`mtj-loader convert`: writes a checkpoint in another dtype. Does not import JAX."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from mtj_loader import display
from mtj_loader.cli import signals
from mtj_loader.cli.command import command
from mtj_loader.cli.output import print_json, print_lines, print_table, warn
from mtj_loader.cli.shared_options import AsJson
from mtj_loader.conversion.casting import Losses
from mtj_loader.conversion.convert_checkpoint import (
    ConvertReport,
    NewDType,
    OnOverflow,
    TensorReport,
)
from mtj_loader.conversion.convert_checkpoint import convert as convert_checkpoint
from mtj_loader.names import blank_indices, escape, fold_names, group_by
from mtj_loader.options import Source


@command
def convert(
    *,
    source: Source,
    dtype: Annotated[NewDType, typer.Option(help="The new dtype of floats; integers are kept.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The output folder; by default <name>-<dtype> next to PATH.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")
    ] = False,
    on_overflow: Annotated[
        OnOverflow,
        typer.Option(
            help="If a value is too large for the dtype: refuse to convert, or clamp the value."
        ),
    ] = "refuse",
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Convert NaN and infinity too.")
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Maximum bytes of tensors per file.")
    ] = "5GB",
    progress: Annotated[
        bool,
        typer.Option(
            "--progress/--no-progress", help="Show a progress bar if stderr is a terminal."
        ),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint of any family in another dtype, with its config and tokenizer.

    The output folder appears only when it is complete.

    Example: [bold]mtj-loader convert mosaicml/mpt-7b-instruct --dtype float16[/bold]
    """
    signals.raise_on_signal()  # so that unfinished output is removed
    report = convert_checkpoint(
        **asdict(source),
        out=out,
        dtype=dtype,
        on_overflow=on_overflow,
        allow_nonfinite=allow_nonfinite,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        progress=progress,
    )
    if as_json:
        print_json(report.to_dict())
        return
    warn(report.warnings)
    print_lines(report)
    print_lists(report)
    if lossy := [tensor for tensor in report.tensors if any(astuple(tensor.losses))]:
        print_table(losses_table(lossy))


def print_lists(report: ConvertReport) -> None:
    """Prints which other files were copied, and which were left out."""
    for verb, names in (("copied", report.copied), ("left out", report.left_out)):
        if names:
            print_lines(f"{verb}: {', '.join(map(escape, names))}")


def losses_table(tensors: Iterable[TensorReport]) -> Table:
    """A table of tensors in which identical layers share a row, with their losses summed."""
    table = display.table("tensor", "dtype", "overflowed", "became zero", "NaN or infinite")
    for group in group_by(tensors, lambda one: (blank_indices(one.name), one.source_dtype)):
        losses = sum((tensor.losses for tensor in group), Losses())
        changed = f"{group[0].source_dtype} → {group[0].dtype}"
        counts = (f"{count:,}" for count in astuple(losses))
        display.add_row(table, fold_names([tensor.name for tensor in group]), changed, *counts)
    return table
