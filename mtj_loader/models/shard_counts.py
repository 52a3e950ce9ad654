"""Which shard counts a model allows."""

from __future__ import annotations

import functools

from mtj_loader.errors import MeshError
from mtj_loader.models.config import ModelConfig
from mtj_loader.models.registry import parameters

# Names of axes in messages.
_AXIS_NAMES = {
    "E": "experts",
    "d": "d_model",
    "e": "d_embed",
    "f": "d_ff, the feed-forward width",
    "g": "key-value heads, neither a multiple nor a divisor",
    "h": "heads",
}


def usable_shards(config: ModelConfig, limit: int) -> list[int]:
    """The shard counts, up to `limit`, that divide everything that is split.

    Fewer KV heads than shards may divide the shards: neighboring shards then hold the same head.
    """
    return [n for n in range(1, limit + 1) if not _undivided(config, n)]


def check_shards(config: ModelConfig, shards: int) -> None:
    """Raises MeshError unless the model can be split into this many shards.

    The message names each dimension that does not divide, and the possible shard counts.
    """
    undivided = _undivided(config, shards)
    if undivided:
        sizes = ", ".join(f"{_AXIS_NAMES[axis]} ({size})" for axis, size in undivided.items())
        usable = usable_shards(config, config.n_heads)  # heads are split in every family
        raise MeshError(
            f"{shards} shards do not divide the model: {sizes}",
            key="mp",
            expected="one of " + ", ".join(map(str, usable)),
            found=shards,
        )


def _undivided(config: ModelConfig, shards: int) -> dict[str, int]:
    """The split axes that so many shards do not divide, and their sizes."""
    return {axis: n for axis, n in _split_axes(config).items() if not _divides(axis, n, shards)}


@functools.lru_cache(maxsize=16)  # of one model, asked for many shard counts
def _split_axes(config: ModelConfig) -> dict[str, int]:
    """The axes that are split over the shards, and their sizes."""
    specs = parameters(config, 1, False)
    return {spec.split: spec.split_size() or 0 for spec in specs if spec.split is not None}


def _divides(axis: str, size: int, shards: int) -> bool:
    if axis == "V":  # padded to a multiple
        return True
    return size % shards == 0 or (axis == "g" and shards % size == 0)
