"""Attention with linear biases (Press et al., 2021, arXiv:2108.12409).

A head's score decreases by `slope` for every position between query and key. Only differences
within a row of scores matter, so distances are counted from the query; transformers counts them
from the first key, which is the same after the softmax.

n shards   b batch   t time (queries)   B keys of one block   h heads
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from mtj_loader.models.layers.linears import SHARDS
from mtj_loader.models.layers.positions import Positions

BIAS_MAX = 8.0  # the smallest slope is 2^-8 in the paper, whatever the number of heads


def bloom_slopes(n_heads: int) -> np.ndarray:  # float32 [h]
    """BLOOM's slopes.

    The first m heads, m being the largest power of two ≤ h, have the paper's slopes for m heads;
    the other heads have every second slope of 2m heads, from the first.
    """
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = _powers(power, np.arange(1, power + 1))
    others = _powers(2 * power, np.arange(1, 2 * (n_heads - power), 2))
    return np.concatenate([slopes, others])


def _powers(heads: int, exponents: np.ndarray) -> np.ndarray:
    base = np.float32(2 ** (-BIAS_MAX / heads))
    return np.power(base, exponents.astype(np.float32))


def mpt_slopes(n_heads: int, bias_max: float = BIAS_MAX) -> np.ndarray:  # float32 [h]
    """MPT's slopes (mosaicml/llm-foundry, `gen_slopes`).

    With m the smallest power of two ≥ h, slope i is 2^(-i·bias_max/m), i from 1; if m is not h, the
    second, fourth, … come first, then the first, third, …, and h of them are taken.
    """
    power = 2 ** math.ceil(math.log2(n_heads))
    exponents = np.arange(1, power + 1, dtype=np.float32) * np.float32(bias_max / power)
    slopes = np.float32(1) / np.power(np.float32(2), exponents)
    if power != n_heads:
        slopes = np.concatenate([slopes[1::2], slopes[::2]])
    return slopes[:n_heads]


def alibi(slopes: np.ndarray, positions: Positions, keys: jax.Array) -> jax.Array:
    """The bias of this shard's heads, to be added to scaled scores.

    Args:
      slopes: float32 [h], of all heads.
      positions: of the queries.
      keys: int32 [B], the positions of the keys.

    Returns:
      float32 [b or 1, h/n, t, B]; zero or negative for visible keys.
    """
    by_shard = jnp.asarray(slopes.reshape(jax.lax.axis_size(SHARDS), -1))  # [n, h/n]
    own = by_shard[jax.lax.axis_index(SHARDS)]
    return own[:, None, None] * positions.distance(keys)[:, None]
