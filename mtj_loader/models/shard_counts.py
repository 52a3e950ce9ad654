"""Which shard counts a model allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mtj_loader.errors import MeshError
from mtj_loader.models.config import ModelConfig
from mtj_loader.models.registry import parameters
from mtj_loader.parameters import AXIS_NAMES, ParamSpec

_RULES = {"g": ", neither a multiple nor a divisor"}  # of axes that need not divide


def usable_shards(config: ModelConfig, limit: int) -> list[int]:
    """The shard counts, up to `limit`, that divide everything that is split.

    Fewer KV heads than shards may divide the shards: neighboring shards then hold the same head.
    """
    sizes = _split_sizes(parameters(config, 1, False))
    return [n for n in range(1, limit + 1) if not _undivided(sizes, n)]


def check_shards(config: ModelConfig, shards: int, transposed_linear: bool = False) -> None:
    """Raises MeshError unless the model can be split into this many shards.

    The message names each dimension that does not divide, and the possible shard counts.
    """
    specs = parameters(config, shards, transposed_linear)  # which the caller needs next
    if undivided := _undivided(_split_sizes(specs), shards):
        sizes = ", ".join(
            f"{AXIS_NAMES[axis]} ({size}){_RULES.get(axis, '')}" for axis, size in undivided.items()
        )
        usable = usable_shards(config, config.n_heads)  # heads are split in every family
        raise MeshError(
            f"{shards} shards do not divide the model: {sizes}",
            key="mp",
            expected="one of " + ", ".join(map(str, usable)),
            found=shards,
        )


def _undivided(sizes: Mapping[str, int], shards: int) -> dict[str, int]:
    """The split axes that so many shards do not divide, and their sizes."""
    return {axis: size for axis, size in sizes.items() if not _divides(axis, size, shards)}


def _split_sizes(specs: Iterable[ParamSpec]) -> dict[str, int]:
    """The axes that are split over the shards, and their full sizes."""
    examples = {spec.split: spec for spec in specs}
    return {axis: spec.split_size() or 0 for axis, spec in examples.items() if axis is not None}


def _divides(axis: str, size: int, shards: int) -> bool:
    if axis == "V":  # padded to a multiple
        return True
    return size % shards == 0 or (axis == "g" and shards % size == 0)
