"""The tensors of a checkpoint in the order of the model, which files do not keep."""

from __future__ import annotations

from collections.abc import Iterable

from mtj_loader.errors import MtjLoaderError
from mtj_loader.formats.records import TensorRecord
from mtj_loader.names import blank_indices, indices, natural_key
from mtj_loader.weights.find_map import find_map
from mtj_loader.weights.resolve import match_name
from mtj_loader.weights.weight_map import WeightMap

Place = tuple[int, int, int]
_BEFORE, _LAYERS, _AFTER = range(3)


def model_order(records: Iterable[TensorRecord], model_type: object) -> list[TensorRecord]:
    """Embedding, layers by number, and what follows them, each in the order of the family's map.

    Without a map for the family, names are sorted, the numbers in them as numbers.
    """
    places = _places(model_type)

    def key(record: TensorRecord) -> tuple[Place, list[tuple[int, str]]]:
        return _place(record.name, places), natural_key(record.name)

    return sorted(records, key=key)


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to: the first number in its name."""
    return next(iter(indices(name)), None)


def _places(model_type: object) -> dict[str, tuple[int, int]]:
    """Each name of the map, its layer left open, with its part of the model and its position."""
    try:
        weight_map = find_map(str(model_type))
    except MtjLoaderError:  # there is none: the order is only for the eye
        return {}
    layered = [pattern.replace("{layer}", "0") for pattern in weight_map.layer]
    parts = [(name, _part(weight_map, name)) for name in weight_map.static]
    parts += [(blank_indices(name), _LAYERS) for name in layered]
    return {name: (part, i) for i, (name, part) in enumerate(parts)}


def _part(weight_map: WeightMap, name: str) -> int:
    target = weight_map.static[name]
    return _BEFORE if target and target.module.startswith("embedding_shard") else _AFTER


def _place(name: str, places: dict[str, tuple[int, int]]) -> Place:
    """Part of the model, layer, position; tensors that the map does not know follow the others."""
    layer = layer_of(name)
    known = match_name(blank_indices(name), places)
    if known is not None:
        part, position = places[known]
        return part, layer or 0, position
    if not places:
        return _LAYERS, 0, 0
    return (_AFTER if layer is None else _LAYERS), layer or 0, len(places)
