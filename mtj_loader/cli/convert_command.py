"""`mtj-loader convert`: writes a checkpoint anew in another dtype. Does without JAX."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from mtj_loader import display
from mtj_loader.cli import signals
from mtj_loader.cli.command import command
from mtj_loader.cli.output import print_json, print_table, warn
from mtj_loader.cli.shared_options import AsJson
from mtj_loader.conversion.convert_checkpoint import NewDType, OnOverflow
from mtj_loader.conversion.convert_checkpoint import convert as convert_checkpoint
from mtj_loader.conversion.convert_report import ConvertReport, TensorReport
from mtj_loader.names import blank_indices, fold_names
from mtj_loader.options import Source


@command
def convert(
    *,
    source: Source,
    dtype: Annotated[NewDType, typer.Option(help="Of the new floats; integers stay as they are.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The folder to make; by default <name>-<dtype> beside PATH.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint that is there already.")
    ] = False,
    on_overflow: Annotated[
        OnOverflow,
        typer.Option(help="What is too large for the dtype is an error, or made its largest."),
    ] = "refuse",
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Convert NaN and infinity all the same.")
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="The most bytes of tensors in a file.")
    ] = "5GB",
    progress: Annotated[
        bool,
        typer.Option(
            "--progress/--no-progress", help="Show a progress bar, where there is a terminal."
        ),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint of any family anew in another dtype, with its config and tokenizer.

    The output appears whole or not at all.

    Example: [bold]mtj-loader convert mosaicml/mpt-7b-instruct --dtype float16[/bold]
    """
    signals.raise_on_signal()  # through the removal of what is half written
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
    print(report)
    print_lists(report)
    if any(map(_losses, report.tensors)):
        print_table(losses_table(report.tensors))


def print_lists(report: ConvertReport) -> None:
    """Says which other files were copied, and which were not."""
    for verb, names in (("copied", report.copied), ("left out", report.left_out)):
        if names:
            print(f"{verb}: {', '.join(names)}")


def losses_table(tensors: Iterable[TensorReport]) -> Table:
    """The tensors that lost something, with the layers folded and their losses summed."""
    groups: dict[object, list[TensorReport]] = {}
    for tensor in filter(_losses, tensors):
        likeness = blank_indices(tensor.name), tensor.source_dtype
        groups.setdefault(likeness, []).append(tensor)
    table = display.table("tensor", "dtype", "overflowed", "became zero", "NaN or infinite")
    for group in groups.values():
        name = fold_names([tensor.name for tensor in group])
        sums = map(sum, zip(*map(_counts, group), strict=True))
        changed = f"{group[0].source_dtype} → {group[0].dtype}"
        table.add_row(Text(name), changed, *(f"{count:,}" for count in sums))
    return table


def _counts(tensor: TensorReport) -> tuple[int, int, int]:
    return tensor.overflow, tensor.underflow, tensor.nonfinite


def _losses(tensor: TensorReport) -> bool:
    return any(_counts(tensor))
