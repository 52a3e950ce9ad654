"""Finds how many of the best tokens to keep without sorting them.

Axes: b rows, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_DROPPED, _KEPT = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max - 1
_TINY = float(jnp.finfo(jnp.float32).tiny)

_State = tuple[jax.Array, jax.Array]


def keep_best(
    scores: jax.Array, weights: jax.Array, target: jax.Array, keep_ties: jax.Array
) -> jax.Array:
    """Keeps the fewest tokens, the highest scores first, whose weights sum to at least the target.

    Args:
      scores: float32 [b, V], no NaN.
      weights: float32 [b, V], 0 or more.
      target: float32 [b]; at least one token is kept.
      keep_ties: bool [b], whether all tokens that tie with the last one are kept, or only as
        many as are needed, of those the ones with the smallest ids.

    Returns:
      bool [b, V]; all true if all the weights sum to less than the target.
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)

    def narrow(state: _State) -> _State:
        order, by_score = state
        cutoff = find_cutoff(order, weights, target)[:, None]
        tied = order == cutoff
        undecided = by_score & jnp.any(~keep_ties & (jnp.sum(tied, axis=1) > 1))
        kept = (order > cutoff) | (tied & keep_ties[:, None])
        return jnp.where(kept, _KEPT, jnp.where(tied, -ids, _DROPPED)), undecided

    by_score = jnp.any(jnp.ones_like(keep_ties))  # true; a second pass, by id, decides ties
    start = _sortable(scores), by_score
    order, _ = jax.lax.while_loop(lambda state: state[1], narrow, start)
    return order != _DROPPED


def find_cutoff(order: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """The largest t for which the weights where order ≥ t sum to at least the target.

    Bisection over the int32 values, 32 sums at most. It is exact: the sum is monotonic in t, also
    as rounded, because every t adds the same numbers, or zeros, in the same order.

    Args:
      order: int32 [b, V].
      weights: float32 [b, V], 0 or more.
      target: float32 [b]; 0 means any positive weight.

    Returns:
      int32 [b]; the smallest int32 if all the weights sum to less than the target.
    """
    target = jnp.maximum(target, _TINY)

    def halve(bounds: _State) -> _State:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean without overflow
        mass = jnp.sum(jnp.where(order >= middle[:, None], weights, 0), axis=1)
        enough = mass >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    high = jnp.max(order, axis=1) + 1
    start = jnp.full_like(high, _DROPPED), high
    return jax.lax.while_loop(lambda bounds: jnp.any(bounds[0] + 1 < bounds[1]), halve, start)[0]


def _sortable(x: jax.Array) -> jax.Array:
    """int32 numbers in the order of the floats, equal where those are equal."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.int32)  # -0 as +0
    return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)
