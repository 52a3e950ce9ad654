"""Repetition, presence and frequency penalties on the tokens of the history.

Axes: b rows, V vocabulary, T length of the history.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtj_loader.sampling.row_settings import RowSettings

_LEAST_PENALTY = 1e-6  # a penalty under 1 with a steep slope would reach 0


def penalize_repetition(
    logits: jax.Array, rows: jax.Array, history: jax.Array, lengths: jax.Array, s: RowSettings
) -> jax.Array:
    """Lowers the logits of the tokens among the last `repetition_penalty_range`.

    A token that occurs several times gets the repetition penalty of its last occurrence.

    Args:
      logits: float32 [b, V].
      rows: bool [b], the rows to change.
      history: int32 [b, T].
      lengths: int32 [b], how much of the history is valid.
      s: the settings.

    Returns:
      float32 [b, V].
    """
    size = window_size(s.repetition_penalty_range, lengths)
    places = jax.lax.broadcasted_iota(jnp.int32, history.shape, 1)
    inside = (places >= (lengths - size)[:, None]) & (places < lengths[:, None]) & rows[:, None]
    ids = jnp.where(inside, history, logits.shape[1])
    last = update_tokens(jnp.full(logits.shape, -1, jnp.int32), ids, places, "max")
    age = lengths[:, None] - 1 - last  # 0 for the last token
    penalty = _penalty(age, size, s)
    lowered = jnp.where(logits > 0, logits / penalty, logits * penalty)
    lowered = lowered - s.presence_penalty[:, None]
    lowered = jax.lax.cond(
        jnp.any(rows & (s.frequency_penalty != 0)),
        lambda x: x - s.frequency_penalty[:, None] * _counts(ids, logits.shape),
        lambda x: x,
        lowered,
    )
    return jnp.where(last >= 0, lowered, logits)


def window_size(limit: jax.Array, lengths: jax.Array) -> jax.Array:
    """How many last tokens a range covers, int32 [b]; a range of 0 covers all."""
    return jnp.where(limit == 0, lengths, jnp.minimum(limit, lengths))


def update_tokens(array: jax.Array, ids: jax.Array, values: jax.Array, how: str) -> jax.Array:
    """Adds, or takes the maximum of, values at token ids; ids outside the vocabulary are skipped.

    Args:
      array: [b, V].
      ids: int32 [b, n].
      values: [b, n].
      how: "add" or "max".

    Returns:
      [b, V].
    """

    def row(array: jax.Array, ids: jax.Array, values: jax.Array) -> jax.Array:
        return getattr(array.at[ids], how)(values, mode="drop")

    return jax.vmap(row)(array, ids, values)


def _counts(ids: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    ones = jnp.ones(ids.shape, jnp.float32)
    return update_tokens(jnp.zeros(shape, jnp.float32), ids, ones, "add")


def _penalty(age: jax.Array, size: jax.Array, s: RowSettings) -> jax.Array:
    """The repetition penalty of a token by its age, float32 [b, V]."""
    full, slope = s.repetition_penalty[:, None], s.repetition_penalty_slope[:, None]
    far = age >= (size - size // 2)[:, None]
    stepped = jnp.where(far, 1 + (full - 1) * slope, full)
    span = s.repetition_penalty_range[:, None] - 1
    x = 1 - 2 * age / jnp.maximum(span, 1)  # 1 for the last token, -1 at the end of the range
    curved = slope * x / (1 + jnp.abs(x) * (slope - 1))
    curved = jnp.where((slope == 0) | (span < 0), full, 1 + (curved + 1) / 2 * (full - 1))
    return jnp.maximum(jnp.where(s.kobold_curve[:, None], curved, stepped), _LEAST_PENALTY)
