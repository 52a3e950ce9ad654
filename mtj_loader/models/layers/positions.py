"""Token positions in one pass, and rotary embedding by them.

b rows   t time (queries)   B keys of one block   h heads of one shard   k head_dim   r rotated dims
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines, float32 [b, t, r/2] each


@dataclass(frozen=True)
class Positions:
    """The positions of the tokens in one pass; the same for every layer.

    Attributes:
      queries: int32 [b, t], or [1, t] if all rows have the same positions.
      rotations: one for each rotary embedding of the model.
      slots: int32 [b], where each row is in the cache; None in a pass without a cache.
      starts: int32 [b], the position of each row's first token.
      counts: int32 [b], the tokens of each row, whose keys and values are written.
      first: int32 [], the smallest position of a query.
      end: int32 [], one more than the largest.
    """

    queries: jax.Array
    rotations: tuple[Rotation, ...] = ()
    slots: Any = None
    starts: Any = None
    counts: Any = None
    first: jax.Array | int = 0
    end: jax.Array | int = 0

    def visible(self, keys: jax.Array, window: int | None = None) -> jax.Array:  # bool [b, t, B]
        """The keys that each query may attend to.

        Args:
          keys: int32 [B], their positions.
          window: how many positions back a query sees, its own included; None for all.
        """
        past = keys <= self.queries[..., None]
        return past if window is None else past & (keys > self.queries[..., None] - window)

    def distance(self, keys: jax.Array) -> jax.Array:  # float32 [b, t, B]
        """Key position − query position: zero or negative for visible keys."""
        return (keys - self.queries[..., None]).astype(jnp.float32)


def rotation(
    frequencies: jax.Array,  # float32 [b, r/2]
    positions: jax.Array,  # int32 [b, t]
    scale: float,
) -> Rotation:
    """Cosine and sine of every pair's angle, times `scale`."""
    angles = positions[..., None].astype(jnp.float32) * frequencies[:, None, :]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate_halves(x: jax.Array, rotation: Rotation) -> jax.Array:  # float32 [b, t, h, k]
    """Rotates the first r dimensions of each head; dimension i is paired with i + r/2."""
    cos, sin = (part[:, :, None, :] for part in rotation)  # [b, t, 1, r/2]
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*rotated, rest], axis=-1)


def rotate_pairs(x: jax.Array, rotation: Rotation) -> jax.Array:  # float32 [b, t, h, k]
    """Rotates the first r dimensions of each head; dimension 2i is paired with 2i + 1."""
    cos, sin = (part[:, :, None, :] for part in rotation)  # [b, t, 1, r/2]
    paired, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    first, second = paired[..., 0::2], paired[..., 1::2]
    rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.reshape(paired.shape), rest], axis=-1)
