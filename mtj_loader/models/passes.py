"""The three passes of a model, as one shard computes them: whole rows, prompts, one more token.

n shards   b batch   t time   T cache length   d model   h heads of one shard   k head_dim
r rotated dims   V padded vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mtj_loader.models.decoder import CausalTransformer
from mtj_loader.models.layers.attention import KVCache, Span, rotation


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What the rows of a batch have been through so far; a pytree.

    Attributes:
      keys, values: a list with one array a layer, [b, T, h, k], placed P("dp", None, "mp").
      frequencies: rotary inverse frequencies of each row, float32 [b, r/2], placed P("dp"); None
        without rotary embedding.
    """

    keys: Any
    values: Any
    frequencies: Any


def whole(
    model: CausalTransformer,
    ids: jax.Array,  # int32 [b, t]
    frequencies: jax.Array | None,  # float32 [b, r/2]
) -> tuple[jax.Array, None]:  # float32 [b, t, V/n]
    """Logits after every token."""
    x, _ = _from_nothing(model, ids, frequencies)
    return model.projection(x), None


def prefill(
    model: CausalTransformer,
    ids: jax.Array,  # int32 [b, t]
    lengths: jax.Array,  # int32 [b]
    frequencies: jax.Array | None,  # float32 [b, r/2]
    cache_length: int,
) -> tuple[jax.Array, Cache]:  # float32 [b, V/n]
    """Logits after each row's last token, and a cache with room for `cache_length` tokens."""
    x, memories = _from_nothing(model, ids, frequencies)
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]  # [b, d]
    room = ((0, 0), (0, cache_length - ids.shape[1]), (0, 0), (0, 0))
    keys, values = zip(*jax.tree.map(lambda m: jnp.pad(m, room), memories), strict=True)
    return model.projection(last), Cache(list(keys), list(values), frequencies)


def step(
    model: CausalTransformer,
    cache: Cache,
    tokens: jax.Array,  # int32 [b]
    positions: jax.Array,  # int32 [b]
) -> tuple[jax.Array, Cache]:  # float32 [b, V/n]
    """Logits after one more token of each row, and the cache with that token."""
    memories = list(zip(cache.keys, cache.values, strict=True))
    span = _span(model, positions[:, None], cache.keys[0].shape[1], cache.frequencies)
    x, memories = model(tokens[:, None], span, memories)
    keys, values = zip(*memories, strict=True)
    return model.projection(x[:, 0]), Cache(list(keys), list(values), cache.frequencies)


def _from_nothing(
    model: CausalTransformer,
    ids: jax.Array,  # int32 [b, t]
    frequencies: jax.Array | None,  # float32 [b, r/2]
) -> tuple[jax.Array, list[KVCache]]:  # [b, t, d]
    """A pass over whole rows; what pads a row on its right is not seen by what stands before."""
    t = ids.shape[1]
    return model(ids, _span(model, jnp.arange(t)[None], t, frequencies), None)


def _span(
    model: CausalTransformer,
    positions: jax.Array,  # int32 [b or 1, t]
    keys: int,
    frequencies: jax.Array | None,  # float32 [b, r/2]
) -> Span:
    turn = None
    if model.rope is not None and frequencies is not None:
        turn = rotation(frequencies, positions, model.rope.scale)
    return Span(positions, jnp.arange(keys), turn)
