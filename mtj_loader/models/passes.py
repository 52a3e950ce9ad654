"""The two passes of a model, as one shard computes them: whole rows, and rows that a cache holds.

n shards   S slots   b rows   t time   T cache length   d model   g KV heads of one shard
k head_dim   r rotated dims   V padded vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mtj_loader.models.decoder import CausalTransformer
from mtj_loader.models.layers.positions import Positions, rotation

Frequencies = tuple[jax.Array, ...]  # of each rotary embedding, float32 [b, r/2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens of several sequences, one in each slot; a pytree.

    Attributes:
      keys, values: a list with one array per layer, [S, g, T, k], placed P("dp", "mp").
    """

    keys: Any
    values: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The tokens of one pass; a pytree.

    Attributes:
      tokens: int32 [b, t].
      starts: int32 [b], the position of each row's first token: so many come before it.
      counts: int32 [b], the tokens of each row. What follows them in `tokens` changes nothing; a
        row with none neither changes its slot nor has a meaningful result.
      frequencies: of each rotary embedding of the model, float32 [b, r/2].
      slots: int32 [b], where the sequences are; rows without tokens may share them with others.
    """

    tokens: Any
    starts: Any
    counts: Any
    frequencies: Any
    slots: Any


def whole(
    model: CausalTransformer,
    ids: jax.Array,  # int32 [b, t]
    frequencies: Frequencies,
) -> jax.Array:  # float32 [b, t, V/n]
    """Logits after every token; padding on the right of a row does not affect its tokens."""
    t = ids.shape[1]
    queries = jnp.arange(t)[None]
    positions = Positions(queries, _rotations(model, queries, frequencies), end=t)
    x, _ = model(ids, positions, None)
    return model.projection(x)


def extend(
    model: CausalTransformer, cache: Cache, rows: Rows
) -> tuple[jax.Array, Cache]:  # [b, t, d]
    """Runs more tokens of each sequence; returns the stream after the last layer, and the cache.

    Prefill extends an empty sequence, and a step of decoding extends by one token.
    """
    t, length = rows.tokens.shape[1], cache.keys[0].shape[2]
    queries = rows.starts[:, None] + jnp.arange(t)
    active = rows.counts > 0
    positions = Positions(
        queries,
        _rotations(model, queries, rows.frequencies),
        starts=rows.starts,
        counts=rows.counts,
        slots=rows.slots,
        first=jnp.min(jnp.where(active, rows.starts, length)),
        end=jnp.max(jnp.where(active, rows.starts + rows.counts, 0)),
    )
    x, caches = model(rows.tokens, positions, list(zip(cache.keys, cache.values, strict=True)))
    keys, values = zip(*caches, strict=True)
    return x, Cache(list(keys), list(values))


def extend_last(
    model: CausalTransformer, cache: Cache, rows: Rows
) -> tuple[jax.Array, Cache]:  # float32 [b, V/n]
    """Like `extend`, with the logits after each row's last token."""
    x, cache = extend(model, cache, rows)
    last = jnp.maximum(rows.counts - 1, 0)[:, None, None]
    return model.projection(jnp.take_along_axis(x, last, axis=1)[:, 0]), cache


def extend_all(
    model: CausalTransformer, cache: Cache, rows: Rows
) -> tuple[jax.Array, Cache]:  # float32 [b, t, V/n]
    """Like `extend`, with the logits after every token."""
    x, cache = extend(model, cache, rows)
    return model.projection(x), cache


def _rotations(
    model: CausalTransformer,
    queries: jax.Array,  # int32 [b or 1, t]
    frequencies: Frequencies,
) -> tuple[tuple[jax.Array, jax.Array], ...]:
    return tuple(
        rotation(each, queries, rope.scale)
        for each, rope in zip(frequencies, model.ropes, strict=True)
    )
