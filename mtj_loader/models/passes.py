"""The three passes of a model, as one shard computes them: whole rows, prompts, a single token.

n shards   b batch   t time   T cache length   d model   h heads of one shard   k head_dim
r rotated dims   V padded vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mtj_loader.models.decoder import CausalTransformer
from mtj_loader.models.layers.attention import KVCache
from mtj_loader.models.layers.positions import Positions, rotation

Frequencies = tuple[jax.Array, ...]  # of each rotary embedding, float32 [b, r/2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of all tokens of a batch so far; a pytree.

    Attributes:
      keys, values: a list with one array per layer, [b, T, h, k], placed P("dp", None, "mp").
      frequencies: rotary inverse frequencies of each row, placed P("dp"); a tuple with one float32
        [b, r/2] for each rotary embedding.
    """

    keys: Any
    values: Any
    frequencies: Any


def whole(
    model: CausalTransformer,
    ids: jax.Array,  # int32 [b, t]
    frequencies: Frequencies,
) -> tuple[jax.Array, None]:  # float32 [b, t, V/n]
    """Logits after every token."""
    x, _ = _run_rows(model, ids, frequencies)
    return model.projection(x), None


def prefill(
    model: CausalTransformer,
    ids: jax.Array,  # int32 [b, t]
    lengths: jax.Array,  # int32 [b]
    frequencies: Frequencies,
    cache_length: int,
) -> tuple[jax.Array, Cache]:  # float32 [b, V/n]
    """Logits after each row's last token, and a cache with room for `cache_length` tokens."""
    x, caches = _run_rows(model, ids, frequencies)
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]  # [b, d]
    room = ((0, 0), (0, cache_length - ids.shape[1]), (0, 0), (0, 0))
    keys, values = zip(*jax.tree.map(lambda x: jnp.pad(x, room), caches), strict=True)
    return model.projection(last), Cache(list(keys), list(values), frequencies)


def step(
    model: CausalTransformer,
    cache: Cache,
    tokens: jax.Array,  # int32 [b]
    positions: jax.Array,  # int32 [b]
) -> tuple[jax.Array, Cache]:  # float32 [b, V/n]
    """Logits after one more token of each row, and the cache with that token."""
    caches = list(zip(cache.keys, cache.values, strict=True))
    length = cache.keys[0].shape[1]
    all_positions = _positions(model, positions[:, None], length, cache.frequencies)
    x, caches = model(tokens[:, None], all_positions, caches)
    keys, values = zip(*caches, strict=True)
    return model.projection(x[:, 0]), Cache(list(keys), list(values), cache.frequencies)


def _run_rows(
    model: CausalTransformer,
    ids: jax.Array,  # int32 [b, t]
    frequencies: Frequencies,
) -> tuple[jax.Array, list[KVCache]]:  # [b, t, d]
    """A pass over whole rows; padding on the right of a row does not affect its tokens."""
    t = ids.shape[1]
    return model(ids, _positions(model, jnp.arange(t)[None], t, frequencies), None)


def _positions(
    model: CausalTransformer,
    queries: jax.Array,  # int32 [b or 1, t]
    keys: int,
    frequencies: Frequencies,
) -> Positions:
    rotations = tuple(
        rotation(each, queries, rope.scale)
        for each, rope in zip(frequencies, model.ropes, strict=True)
    )
    return Positions(queries, jnp.arange(keys), rotations)
