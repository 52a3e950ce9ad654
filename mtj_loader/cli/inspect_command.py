"""`mtj-loader inspect`: what is in a checkpoint. Reads headers only, and does without JAX."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from mtj_loader import display
from mtj_loader.cli.command import command
from mtj_loader.cli.order import layer_of, model_order
from mtj_loader.cli.output import print_json, print_table, warn
from mtj_loader.cli.shared_options import AsJson
from mtj_loader.display import counted, show_bytes
from mtj_loader.errors import UsageError
from mtj_loader.formats.checkpoint import Checkpoint, open_checkpoint
from mtj_loader.formats.records import TensorRecord
from mtj_loader.names import blank_indices, fold_names
from mtj_loader.options import Source


@command
def inspect(
    *,
    source: Source,
    as_json: AsJson = False,
    topology: Annotated[
        bool,
        typer.Option("--topology", help="Print `NAME torch.Size([…])`, a line for each tensor."),
    ] = False,
) -> None:
    """Show the tensors of a checkpoint: name, dtype, shape, file, bytes.

    Only headers are read. Layers that are alike share a line; --topology and --json have them all.

    Example: [bold]mtj-loader inspect EleutherAI/pythia-70m --topology[/bold]
    """
    if as_json and topology:
        raise UsageError("--json and --topology exclude each other")
    checkpoint = open_checkpoint(source)
    with checkpoint.storage:
        records = model_order(
            checkpoint.index.records.values(), checkpoint.config.get("model_type")
        )
    if as_json:
        print_json(to_dict(checkpoint, records))
        return
    warn(checkpoint.index.warnings)
    if topology:
        print("\n".join(topology_lines(records)))
    else:
        print_table(tables(checkpoint, records))


def topology_lines(records: Sequence[TensorRecord]) -> Iterator[str]:
    """A line for each tensor, and an empty one wherever the layer changes."""
    for i, (_, block) in enumerate(groupby(records, key=lambda record: layer_of(record.name))):
        if i:
            yield ""
        for record in block:
            yield f"{record.name} torch.Size({list(record.shape)})"


def tables(checkpoint: Checkpoint, records: Sequence[TensorRecord]) -> RenderableType:
    """What is there in all, and a table of the tensors with the layers folded."""
    groups: dict[object, list[TensorRecord]] = {}
    for record in records:
        likeness = blank_indices(record.name), record.dtype, record.shape
        groups.setdefault(likeness, []).append(record)
    table = display.table("tensor", "dtype", "shape", "file", "bytes")
    for group in groups.values():
        table.add_row(*map(Text, _cells(group)))
    return Group(display.facts(_facts(checkpoint, records)), table)


def _facts(checkpoint: Checkpoint, records: Sequence[TensorRecord]) -> dict[str, str]:
    weights = sum(math.prod(record.shape) for record in records)
    size = show_bytes(sum(record.size_bytes for record in records))
    files = counted(len(checkpoint.index.files), "file")
    return {
        "checkpoint": checkpoint.location,
        "model": str(checkpoint.config.get("model_type", "not named in config.json")),
        "tensors": f"{len(records):,} with {weights:,} weights, {size} in {files}",
    }


def _cells(group: Sequence[TensorRecord]) -> tuple[str, str, str, str, str]:
    first, files = group[0], sorted({record.file for record in group})
    return (
        fold_names([record.name for record in group]),
        first.dtype,
        str(list(first.shape)),
        files[0] if len(files) == 1 else counted(len(files), "file"),
        show_bytes(sum(record.size_bytes for record in group)),
    )


def to_dict(checkpoint: Checkpoint, records: Sequence[TensorRecord]) -> dict[str, object]:
    """A checkpoint as JSON types; docs/json.md describes every key."""
    files = checkpoint.index.files.values()
    return {
        "location": checkpoint.location,
        "model_type": checkpoint.config.get("model_type"),
        "files": [{"name": stamp.path, "bytes": stamp.size_bytes} for stamp in files],
        "tensors": [record.to_dict() for record in records],
        "warnings": list(checkpoint.index.warnings),
    }
