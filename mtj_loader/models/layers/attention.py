"""Causal attention with a cache, and rotary positions.

b batch   t time (queries)   T time (keys)   h heads and g KV heads of one shard   k head_dim
r rotated dims
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

# One layer's keys and values, [b, T, g, k] each.
KVCache = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class Span:
    """Where the tokens of one pass stand; the same for every layer.

    Attributes:
      positions: int32 [b, t], or [1, t] where all rows stand alike.
      key_positions: int32 [T], of the keys that are attended to.
      rotation: cosines and sines, float32 [b, t, r/2] each; None without rotary embedding.
    """

    positions: jax.Array
    key_positions: jax.Array
    rotation: tuple[jax.Array, jax.Array] | None

    @property
    def visible(self) -> jax.Array:  # bool [b, t, T]
        """The keys that each query may attend to: its own position and those before."""
        return self.key_positions <= self.positions[..., None]

    def within(self, window: int) -> jax.Array:  # bool [b, t, T]
        """Of the visible keys the last `window`, a query's own position among them."""
        return self.visible & (self.key_positions > self.positions[..., None] - window)

    @property
    def distance(self) -> jax.Array:  # float32 [b, t, T]
        """Key position − query position: not above zero for visible keys."""
        return (self.key_positions - self.positions[..., None]).astype(jnp.float32)


def rotation(
    frequencies: jax.Array,  # float32 [b, r/2]
    positions: jax.Array,  # int32 [b, t]
    scale: float,
) -> tuple[jax.Array, jax.Array]:  # float32 [b, t, r/2] each
    """Cosine and sine of every pair's angle, times `scale`."""
    angles = positions[..., None].astype(jnp.float32) * frequencies[:, None, :]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate_halves(x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the first r dimensions of each head; dimension i is paired with i + r/2.

    Args:
      x: float32 [b, t, h, k].
      turn: cosines and sines, float32 [b, t, r/2] each.
    """
    cos, sin = (part[:, :, None, :] for part in turn)  # [b, t, 1, r/2]
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*turned, rest], axis=-1)


def rotate_pairs(x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the first r dimensions of each head; dimension 2i is paired with 2i + 1.

    Args:
      x: float32 [b, t, h, k].
      turn: cosines and sines, float32 [b, t, r/2] each.
    """
    cos, sin = (part[:, :, None, :] for part in turn)  # [b, t, 1, r/2]
    turning, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    first, second = turning[..., 0::2], turning[..., 1::2]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.reshape(turning.shape), rest], axis=-1)


def update_cache(memory: KVCache | None, new: KVCache, positions: jax.Array) -> KVCache:
    """The keys and values to attend to: the new ones, or the cache with the new ones in it.

    Args:
      memory: the cache, [b, T, g, k] each; None in a pass that starts from nothing.
      new: those of this pass, [b, t, g, k] each.
      positions: int32 [b, t], where to write; what lies outside the cache is dropped.
    """
    if memory is None:
        return new
    rows = jnp.arange(positions.shape[0])[:, None]
    keys, values = (
        old.at[rows, positions].set(fresh, mode="drop")
        for old, fresh in zip(memory, new, strict=True)
    )
    return keys, values


def attend(
    q: jax.Array,  # [b, t, h, k]
    memory: KVCache,  # [b, T, g, k] each
    visible: jax.Array,  # bool [b, t, T]
    scale: float,
    bias: jax.Array | None = None,  # float32 [b or 1, h, t, T]
) -> jax.Array:  # [b, t, h, k]
    """Softmax attention; scores, to which `bias` is added, and softmax in float32.

    With g < h every h/g neighboring heads attend to the same keys and values (grouped queries,
    Ainslie et al., 2023, arXiv:2305.13245).
    """
    keys, values = memory
    scores = _scores(q, keys) * scale
    scores = scores if bias is None else scores + bias
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)  # every query sees at least itself
    return _mixture(weights.astype(values.dtype), values).astype(values.dtype)


def _scores(q: jax.Array, keys: jax.Array) -> jax.Array:
    """[b, t, h, k] and [b, T, g, k] -> float32 [b, h, t, T]."""
    b, t, h, k = q.shape
    grouped = q.reshape(b, t, keys.shape[2], -1, k)  # [b, t, g, h/g, k]
    return _product("btgrk,bTgk->bgrtT", grouped, keys).reshape(b, h, t, -1)


def _mixture(weights: jax.Array, values: jax.Array) -> jax.Array:
    """[b, h, t, T] and [b, T, g, k] -> float32 [b, t, h, k]."""
    b, h, t, keys = weights.shape
    grouped = weights.reshape(b, values.shape[2], -1, t, keys)  # [b, g, h/g, t, T]
    return _product("bgrtT,bTgk->btgrk", grouped, values).reshape(b, t, h, -1)


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:  # float32
    return jnp.einsum(
        equation,
        x,
        y,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
