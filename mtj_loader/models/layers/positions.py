"""Positions that enter with the tokens: learned ones, and sinusoids.

n shards   b batch   t time   p positions   d model   e embedding
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from mtj_loader.models.layers.parts import Embedding, add_residual, gather_columns
from mtj_loader.models.parameter_table import Declaration
from mtj_loader.parameters import ParamSpec

_WAVELENGTHS = 10_000.0  # ratio of the longest to the shortest (Vaswani et al., 2017)
FAIRSEQ_OFFSET = 2  # fairseq's first position is padding_idx + 1, and its padding_idx is 1
MIN_SINUSOIDAL_WIDTH = 4  # the frequencies' exponent divides by width/2 − 1


def learned_positions(declare: Declaration) -> ParamSpec:
    """The table of learned positions; its columns are split, as MTJ does."""
    return declare.parameter("embedding_shard", "pos_embs", "p d", "d")


class PositionedEmbedding(Embedding):
    """Token embedding, and learned positions; for d = e."""

    def at(self, ids: jax.Array, positions: jax.Array) -> jax.Array:
        """Tokens and their positions.

        Args:
          ids: int32 [b, t].
          positions: int32 [b or 1, t].

        Returns:
          [b, t, d].
        """
        rows = gather_columns(self.position_columns(positions))
        return add_residual(self(ids), rows.astype(jnp.float32))

    def position_columns(self, positions: jax.Array) -> jax.Array:  # -> [b or 1, t, d/n]
        """This shard's columns of the rows of these positions."""
        return self.parameter("pos_embs")[positions]


def sinusoids(positions: jax.Array, width: int, pad_token_id: int) -> jax.Array:
    """Sinusoidal positions as fairseq and tensor2tensor have them: sines, then cosines.

    Frequencies are 10000^(-i / (width/2 − 1)); an odd width ends in a zero. The row of fairseq's
    padding index is zero, wherever it stands.

    Args:
      positions: int32 [b or 1, t], counted from 0.
      width: d, at least LEAST_SINUSOIDAL_WIDTH.
      pad_token_id: fairseq's padding index, counted with its offset.

    Returns:
      float32 [b or 1, t, width].
    """
    half = width // 2
    exponents = np.arange(half, dtype=np.float32)
    frequencies = np.exp(exponents * np.float32(-math.log(_WAVELENGTHS) / (half - 1)))
    rows = positions[..., None] + FAIRSEQ_OFFSET
    angles = rows.astype(jnp.float32) * frequencies
    odd = jnp.zeros((*positions.shape, width % 2), jnp.float32)
    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles), odd], axis=-1)
    return jnp.where(rows == pad_token_id, 0, table)
