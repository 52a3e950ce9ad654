"""`mtj-loader convert`: writes a checkpoint in another dtype. Does not import JAX."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from mtj_loader import display
from mtj_loader.cli import signals
from mtj_loader.cli.command import command
from mtj_loader.cli.output import print_json, print_lines, print_table, warn
from mtj_loader.cli.shared_options import AsJson
from mtj_loader.conversion.convert_checkpoint import (
    ConvertReport,
    NewDType,
    OnOverflow,
    TensorReport,
)
from mtj_loader.conversion.convert_checkpoint import convert as convert_checkpoint
from mtj_loader.names import blank_indices, escape, fold_names
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
        source.path,
        out,
        dtype=dtype,
        on_overflow=on_overflow,
        allow_nonfinite=allow_nonfinite,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        progress=progress,
        revision=source.revision,
        token=source.token,
        cache_dir=source.cache_dir,
        local_files_only=source.local_files_only,
        stream=source.stream,
    )
    if as_json:
        print_json(report.to_dict())
        return
    warn(report.warnings)
    print_lines(report)
    print_lists(report)
    if any(map(_has_losses, report.tensors)):
        print_table(losses_table(report.tensors))


def print_lists(report: ConvertReport) -> None:
    """Prints which other files were copied, and which were left out."""
    for verb, names in (("copied", report.copied), ("left out", report.left_out)):
        if names:
            print_lines(f"{verb}: {', '.join(map(escape, names))}")


def losses_table(tensors: Iterable[TensorReport]) -> Table:
    """The tensors that lost values; identical layers share a row, with their losses summed."""
    groups: dict[object, list[TensorReport]] = {}
    for tensor in filter(_has_losses, tensors):
        key = blank_indices(tensor.name), tensor.source_dtype
        groups.setdefault(key, []).append(tensor)
    table = display.table("tensor", "dtype", "overflowed", "became zero", "NaN or infinite")
    for group in groups.values():
        name = fold_names([tensor.name for tensor in group])
        sums = map(sum, zip(*map(_counts, group), strict=True))
        changed = f"{group[0].source_dtype} → {group[0].dtype}"
        display.add_row(table, name, changed, *(f"{count:,}" for count in sums))
    return table


def _counts(tensor: TensorReport) -> tuple[int, int, int]:
    return tensor.overflow, tensor.underflow, tensor.nonfinite


def _has_losses(tensor: TensorReport) -> bool:
    return any(_counts(tensor))
