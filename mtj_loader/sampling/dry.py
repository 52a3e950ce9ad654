"""DRY ("don't repeat yourself"): penalizes tokens that would continue a repetition.

Axes: b rows, V vocabulary, T length of the history, W words of a bitmask.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtj_loader.sampling.penalties import update_tokens, window_size
from mtj_loader.sampling.row_settings import RowSettings

_MAX_LOG = 60.0  # exp of more, times a multiplier, could overflow float32


def penalize_sequences(
    logits: jax.Array, rows: jax.Array, history: jax.Array, lengths: jax.Array, s: RowSettings
) -> jax.Array:
    """Subtracts multiplier · base^(n - allowed) from tokens that would continue a repetition.

    If the last n tokens also occur earlier in the range, and n ≥ allowed, then the token that
    followed them there is penalized; the longest such n counts. The n tokens contain no breaker.

    Args:
      logits: float32 [b, V].
      rows: bool [b], the rows to change.
      history: int32 [b, T].
      lengths: int32 [b], how much of the history is valid.
      s: the settings.

    Returns:
      float32 [b, V].
    """
    reverse = _reverse(history, lengths, window_size(s.dry_range, lengths))
    matched = _match_lengths(reverse, jnp.where(rows, _longest(reverse, s), 0))
    # The token before a place in the reversed history followed it in the text.
    ids = jnp.where((reverse[:, 1:] >= 0) & rows[:, None], reverse[:, :-1], logits.shape[1])
    longest = update_tokens(jnp.full(logits.shape, -1, jnp.int32), ids, matched[:, 1:], "max")
    beyond = longest - s.dry_allowed_length[:, None]
    exponent = jnp.minimum(beyond * jnp.log(s.dry_base)[:, None], _MAX_LOG)
    penalty = s.dry_multiplier[:, None] * jnp.exp(exponent)
    return jnp.where((longest >= 0) & (beyond >= 0), logits - penalty, logits)


def _reverse(history: jax.Array, lengths: jax.Array, size: jax.Array) -> jax.Array:
    """The last `size` tokens, the last one first, then -1; int32 [b, T]."""
    age = jax.lax.broadcasted_iota(jnp.int32, history.shape, 1)
    places = jnp.maximum(lengths[:, None] - 1 - age, 0)
    return jnp.where(age < size[:, None], jnp.take_along_axis(history, places, axis=1), -1)


def _longest(reverse: jax.Array, s: RowSettings) -> jax.Array:
    """The longest repetition that counts, int32 [b]: up to a breaker, or where floats overflow."""
    words = jnp.take_along_axis(s.dry_breakers, jnp.maximum(reverse, 0) // 32, axis=1)
    breaks = ((words >> (reverse % 32).astype(jnp.uint32)) & 1 == 1) | (reverse < 0)
    age = jax.lax.broadcasted_iota(jnp.int32, reverse.shape, 1)
    before_breaker = jnp.min(jnp.where(breaks, age, reverse.shape[1]), axis=1)
    useful = _MAX_LOG / jnp.maximum(jnp.log(s.dry_base), 1e-3) + 1
    return jnp.minimum(before_breaker, s.dry_allowed_length + useful.astype(jnp.int32))


def _match_lengths(reverse: jax.Array, limit: jax.Array) -> jax.Array:
    """How many tokens from each place on equal those from the start on; int32 [b, T].

    One pass over the history per token of the longest repetition.
    """
    length = reverse.shape[1]
    padded = jnp.pad(reverse, ((0, 0), (0, length)), constant_values=-1)
    places = jax.lax.broadcasted_iota(jnp.int32, reverse.shape, 1)

    def extend(
        state: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        n, alive, matched = state
        first = jax.lax.dynamic_slice_in_dim(padded, n, 1, axis=1)
        here = jax.lax.dynamic_slice_in_dim(padded, n, length, axis=1)
        alive = alive & (here == first) & (n < limit)[:, None]
        return n + 1, alive, matched + alive

    start = (reverse >= 0) & (places > 0)
    _, _, matched = jax.lax.while_loop(
        lambda state: jnp.any(state[1]), extend, (jnp.int32(0), start, jnp.zeros_like(reverse))
    )
    return matched
