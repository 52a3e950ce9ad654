"""Temperature, dynamic temperature and smoothing.

Axes: b rows, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtj_loader.sampling.row_settings import RowSettings
from mtj_loader.sampling.truncation import entropy, keep_top_n_sigma

_LOWEST = 1e-6  # a dynamic temperature may reach 0, where only the maximum is left


def apply_temperature(logits: jax.Array, rows: jax.Array, s: RowSettings) -> jax.Array:
    """Divides the logits, smooths them, and keeps the top n sigmas.

    Args:
      logits: float32 [b, V].
      rows: bool [b], the rows to change.
      s: the settings.

    Returns:
      float32 [b, V].
    """
    dynamic = rows & (s.dynatemp_range > 0)
    temperature = jax.lax.cond(
        jnp.any(dynamic),
        lambda: jnp.where(dynamic, _dynamic_temperature(logits, s), s.temperature),
        lambda: s.temperature,
    )
    logits = jnp.where(rows[:, None], logits / temperature[:, None], logits)
    smooth = rows & (s.smoothing_factor > 0)
    logits = jax.lax.cond(jnp.any(smooth), lambda x: _smooth(x, smooth, s), lambda x: x, logits)
    cut = rows & (s.top_n_sigma > 0)
    return jax.lax.cond(jnp.any(cut), lambda x: keep_top_n_sigma(x, cut, s), lambda x: x, logits)


def _dynamic_temperature(logits: jax.Array, s: RowSettings) -> jax.Array:
    """Low + (high - low) · (entropy / the largest possible)^exponent, float32 [b]."""
    low = jnp.maximum(s.temperature - s.dynatemp_range, 0)
    high = s.temperature + s.dynatemp_range
    count = jnp.sum(logits > -jnp.inf, axis=1)
    largest = jnp.log(jnp.maximum(count, 2).astype(jnp.float32))  # one token alone has entropy 0
    normalized = jnp.clip(entropy(logits) / largest, 0, 1)
    return jnp.maximum(low + (high - low) * normalized**s.dynatemp_exponent, _LOWEST)


def _smooth(logits: jax.Array, rows: jax.Array, s: RowSettings) -> jax.Array:
    """The maximum plus -k · f · d² + c · f · d³, where d is the distance from the maximum."""
    largest = jnp.max(logits, axis=1, keepdims=True)
    d = logits - largest
    k = ((3 - s.smoothing_curve) / 2 * s.smoothing_factor)[:, None]
    c = ((s.smoothing_curve - 1) / 2 * s.smoothing_factor)[:, None]
    smoothed = largest + d * d * (c * d - k)
    return jnp.where(rows[:, None] & (d > -jnp.inf), smoothed, logits)
