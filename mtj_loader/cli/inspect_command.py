"""`mtj-loader inspect`: lists the tensors of a checkpoint. Reads only headers, without JAX."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Annotated

import typer
from rich.console import Group, RenderableType

from mtj_loader import display
from mtj_loader.cli.command import command
from mtj_loader.cli.output import print_json, print_lines, print_remarks, print_table
from mtj_loader.cli.shared_options import AsJson
from mtj_loader.display import counted, show_bytes
from mtj_loader.errors import MtjLoaderError, UsageError
from mtj_loader.formats.checkpoint import Checkpoint, open_checkpoint
from mtj_loader.formats.known_settings import ignored_settings, remarks
from mtj_loader.formats.records import TensorRecord
from mtj_loader.names import blank_indices, fold_names, group_by, indices, natural_key
from mtj_loader.options import Source
from mtj_loader.weights.map_reader import find_map
from mtj_loader.weights.resolve import match_name
from mtj_loader.weights.weight_map import WeightMap

Place = tuple[int, int, int]  # a part of the model, a layer, a position in the map
_BEFORE, _LAYERS, _AFTER = range(3)  # the parts of the model


@command
def inspect(
    *,
    source: Source,
    as_json: AsJson = False,
    topology: Annotated[
        bool,
        typer.Option(
            "--topology",
            help="Print `NAME torch.Size([…])` for each tensor, with an empty line between layers.",
        ),
    ] = False,
) -> None:
    """List the tensors of a checkpoint: name, dtype, shape, file, bytes.

    Only headers are read. Identical layers share one line; --topology and --json list every tensor.

    Example: [bold]mtj-loader inspect EleutherAI/pythia-70m --topology[/bold]
    """
    if as_json and topology:
        raise UsageError("--json and --topology cannot be combined")
    checkpoint = open_checkpoint(source)
    with checkpoint.storage:
        records = sort_by_model(
            checkpoint.index.records.values(), checkpoint.config.get("model_type")
        )
    if as_json:
        print_json(to_dict(checkpoint, records))
        return
    notes, doubts = _remarks(checkpoint)
    print_remarks(notes, [*checkpoint.index.warnings, *doubts])
    if topology:
        print_lines("\n".join(topology_lines(records)))
    else:
        print_table(tables(checkpoint, records))


def _remarks(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Notes and warnings about config.json."""
    return remarks(checkpoint.config, ignored_settings(checkpoint.config))


def topology_lines(records: Sequence[TensorRecord]) -> Iterator[str]:
    """One line per tensor, with an empty line between layers."""
    for i, (_, block) in enumerate(groupby(records, key=lambda record: _layer(record.name))):
        if i:
            yield ""
        for record in block:
            yield f"{record.name} torch.Size({list(record.shape)})"


def tables(checkpoint: Checkpoint, records: Sequence[TensorRecord]) -> RenderableType:
    """The totals, and a table of the tensors in which identical layers share a row."""

    def key(record: TensorRecord) -> tuple[object, ...]:
        return blank_indices(record.name), record.dtype, record.shape

    table = display.table("tensor", "dtype", "shape", "file", "bytes")
    for group in group_by(records, key):
        display.add_row(table, *_cells(group))
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
        "files": [{"name": file.path, "bytes": file.size_bytes} for file in files],
        "tensors": [record.to_dict() for record in records],
        "ignored_settings": ignored_settings(checkpoint.config),
        "warnings": [*checkpoint.index.warnings, *_remarks(checkpoint)[1]],
    }


def sort_by_model(records: Iterable[TensorRecord], model_type: object) -> list[TensorRecord]:
    """Sorts tensors as the model uses them; files often list them alphabetically.

    The embedding comes first, then the layers by number, then the rest; each part in the order of
    the family's map. Without a map, names are sorted, with the numbers in them as numbers.
    """
    places = _places(model_type)

    def key(record: TensorRecord) -> tuple[Place, list[tuple[int, str]]]:
        return _place(record.name, places), natural_key(record.name)

    return sorted(records, key=key)


def _layer(name: str) -> int | None:
    """The layer that a tensor belongs to: the first number in its name."""
    return next(iter(indices(name)), None)


def _places(model_type: object) -> dict[str, tuple[int, int]]:
    """Name in the map, with blank indices → part of the model, position in the map."""
    try:
        weight_map = find_map(str(model_type))
    except MtjLoaderError:  # no map for this family: the order only affects the output's layout
        return {}
    layered = [pattern.replace("{layer}", "0") for pattern in weight_map.layer]
    parts = [(name, _part(weight_map, name)) for name in weight_map.static]
    parts += [(blank_indices(name), _LAYERS) for name in layered]
    return {name: (part, i) for i, (name, part) in enumerate(parts)}


def _part(weight_map: WeightMap, name: str) -> int:
    targets = weight_map.static[name]
    embedding = any(target.module.startswith("embedding_shard") for target in targets)
    return _BEFORE if embedding else _AFTER


def _place(name: str, places: dict[str, tuple[int, int]]) -> Place:
    """Where a tensor comes; tensors that are not in the map come last in their layer."""
    layer = _layer(name)
    known = match_name(blank_indices(name), places)
    if known is not None:
        part, position = places[known]
        return part, layer or 0, position
    if not places:
        return _LAYERS, 0, 0
    return (_AFTER if layer is None else _LAYERS), layer or 0, len(places)
