"""Token positions in one pass, and rotary embedding by them.

b batch   t time (queries)   T time (keys)   h heads of one shard   k head_dim   r rotated dims
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines, float32 [b, t, r/2] each


@dataclass(frozen=True)
class Positions:
    """The positions of the tokens in one pass; the same for every layer.

    Attributes:
      queries: int32 [b, t], or [1, t] if all rows have the same positions.
      keys: int32 [T], of the keys that are attended to.
      rotations: one for each rotary embedding of the model.
    """

    queries: jax.Array
    keys: jax.Array
    rotations: tuple[Rotation, ...] = ()

    def visible(self, window: int | None = None) -> jax.Array:  # bool [b, t, T]
        """The keys that each query may attend to.

        Args:
          window: how many positions back a query sees, its own included; None for all.
        """
        past = self.keys <= self.queries[..., None]
        return past if window is None else past & (self.keys > self.queries[..., None] - window)

    @property
    def distance(self) -> jax.Array:  # float32 [b, t, T]
        """Key position − query position: zero or negative for visible keys."""
        return (self.keys - self.queries[..., None]).astype(jnp.float32)


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
