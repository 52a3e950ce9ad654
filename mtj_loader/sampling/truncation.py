"""Samplers that drop tokens: their logits become minus infinity.

Each returns new logits; a token that was dropped before counts as absent. docs/sampling.md names
the sources of the formulas.

Axes: b rows, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtj_loader.sampling.cutoff import find_cutoff, keep_best
from mtj_loader.sampling.row_settings import TFS, TOP_K, TYPICAL, RowSettings
from mtj_loader.sampling.sort import sort_descending

_LN_2 = 0.6931471805599453


def probabilities(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Unnormalized probabilities and their sums.

    Returns:
      exp(logits - their maximum), float32 [b, V], and its sums, float32 [b].
    """
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return weights, jnp.sum(weights, axis=1)


def entropy(logits: jax.Array) -> jax.Array:
    """The entropy of the softmax of logits, in nats, float32 [b]."""
    weights, total = probabilities(logits)
    return _entropy(logits, weights, total)


def keep_best_tokens(
    logits: jax.Array, rows: jax.Array, stage: jax.Array, s: RowSettings
) -> jax.Array:
    """Top-k, top-p, tail-free or typical sampling, whichever a row's stage names.

    They share one search: each keeps the fewest tokens, best first, that suffice.

    Args:
      logits: float32 [b, V].
      rows: bool [b], the rows to change.
      stage: int32 [b], `TOP_K`, `TFS`, `TYPICAL`, or anything else for top-p.
      s: the settings.
    """
    weights, total = probabilities(logits)
    tail_free, typical = rows & (stage == TFS), stage == TYPICAL
    count = jax.lax.cond(
        jnp.any(tail_free),
        lambda: jnp.where(tail_free, _tail_free_count(logits, s), s.top_k),
        lambda: s.top_k,
    )
    counted = tail_free | (stage == TOP_K)
    mass = jnp.where(typical, s.typical_p, s.top_p) * total
    kept = keep_best(
        jnp.where(typical[:, None], -_deviation(logits, weights, total), logits),
        jnp.where(counted[:, None], 1, weights),
        jnp.where(counted, count.astype(jnp.float32), mass),
        keep_ties=(stage == TOP_K) | ~rows,
    )
    return jnp.where(kept | ~rows[:, None], logits, -jnp.inf)


def keep_top_a(logits: jax.Array, rows: jax.Array, s: RowSettings) -> jax.Array:
    """Keeps p ≥ a · p_max², and the maximum."""
    _, total = probabilities(logits)
    log_ratio = jnp.log(s.top_a) - jnp.log(total)  # p_max = 1 / total
    return _keep_from(logits, rows, jnp.max(logits, axis=1) + jnp.minimum(log_ratio, 0))


def keep_min_p(logits: jax.Array, rows: jax.Array, s: RowSettings) -> jax.Array:
    """Keeps p ≥ m · p_max."""
    return _keep_from(logits, rows, jnp.max(logits, axis=1) + jnp.log(s.min_p))


def keep_top_n_sigma(logits: jax.Array, rows: jax.Array, s: RowSettings) -> jax.Array:
    """Keeps logits within n standard deviations of the maximum."""
    present = logits > -jnp.inf
    count = jnp.sum(present, axis=1)
    mean = jnp.sum(jnp.where(present, logits, 0), axis=1) / count
    squares = jnp.where(present, jnp.square(logits - mean[:, None]), 0)
    deviation = jnp.sqrt(jnp.sum(squares, axis=1) / count)
    return _keep_from(logits, rows, jnp.max(logits, axis=1) - s.top_n_sigma * deviation)


def exclude_top_choices(
    logits: jax.Array, rows: jax.Array, uniform: jax.Array, s: RowSettings
) -> jax.Array:
    """XTC: drops all tokens with at least the threshold's probability but the least likely one.

    Of several least likely ones, the one with the largest id stays.

    Args:
      logits: float32 [b, V].
      rows: bool [b], the rows that XTC is on for.
      uniform: float32 [b], random numbers in [0, 1).
      s: the settings.
    """
    weights, total = probabilities(logits)
    chosen = (weights >= (s.xtc_threshold * total)[:, None]) & (logits > -jnp.inf)
    least = jnp.min(jnp.where(chosen, logits, jnp.inf), axis=1, keepdims=True)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    last = jnp.max(jnp.where(chosen & (logits == least), ids, -1), axis=1, keepdims=True)
    drawn = rows & (uniform < s.xtc_probability)
    return jnp.where(chosen & (ids != last) & drawn[:, None], -jnp.inf, logits)


def keep_below_surprise(logits: jax.Array, rows: jax.Array, mu: jax.Array) -> jax.Array:
    """Mirostat's cut: keeps tokens with -log2 p ≤ mu, and the maximum."""
    _, total = probabilities(logits)
    lowest = jnp.minimum(jnp.log(total) - mu * _LN_2, 0)
    return _keep_from(logits, rows, jnp.max(logits, axis=1) + lowest)


def _keep_from(logits: jax.Array, rows: jax.Array, lowest: jax.Array) -> jax.Array:
    return jnp.where((logits >= lowest[:, None]) | ~rows[:, None], logits, -jnp.inf)


def _entropy(logits: jax.Array, weights: jax.Array, total: jax.Array) -> jax.Array:
    below = logits - jnp.max(logits, axis=1, keepdims=True)
    parts = jnp.where(weights > 0, weights * below, 0)
    return jnp.log(total) - jnp.sum(parts, axis=1) / total


def _deviation(logits: jax.Array, weights: jax.Array, total: jax.Array) -> jax.Array:
    """How far each token's surprise is from the entropy: |-ln p - H|, float32 [b, V]."""
    below = logits - jnp.max(logits, axis=1, keepdims=True)
    surprise = jnp.log(total)[:, None] - below
    return jnp.abs(surprise - _entropy(logits, weights, total)[:, None])


def _tail_free_count(logits: jax.Array, s: RowSettings) -> jax.Array:
    """How many tokens are left of where the curve of the sorted probabilities is flat; int32 [b].

    The absolute second differences of the sorted probabilities, normalized, are summed up; the
    token in the middle of the three that make a difference goes once the sum exceeds tfs.
    """
    vocab_size = logits.shape[1]
    if vocab_size < 3:  # no second difference
        return jnp.full_like(s.top_k, vocab_size)
    weights, _ = probabilities(sort_descending(logits))
    bends = jnp.abs(jnp.diff(weights, n=2, axis=1))
    places = jnp.zeros_like(bends, jnp.int32) + jnp.arange(vocab_size - 2)
    last = find_cutoff(-places, bends, s.tfs * jnp.sum(bends, axis=1))
    return 1 - jnp.maximum(last, 1 - vocab_size)
