"""Runs the samplers of every row in the row's own order.

Axes: b rows, V vocabulary, T length of the history.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mtj_loader.sampling.penalties import penalize_repetition
from mtj_loader.sampling.row_settings import (
    NO_STAGE,
    PENALTIES,
    TEMPERATURE,
    TFS,
    TOP_A,
    TOP_K,
    TOP_P,
    TYPICAL,
    RowSettings,
)
from mtj_loader.sampling.temperature import apply_temperature
from mtj_loader.sampling.truncation import keep_best_tokens, keep_min_p, keep_top_a

# Takes logits, float32 [b, V], and the rows to change, bool [b].
Sampler = Callable[[jax.Array, jax.Array], jax.Array]


def apply_samplers(
    logits: jax.Array, history: jax.Array, lengths: jax.Array, s: RowSettings
) -> jax.Array:
    """Applies `s.stages` to the logits, float32 [b, V].

    The program contains each sampler once, in a loop over the places of the order. A sampler runs
    if any row has it at that place, and changes those rows only.
    """
    places = jnp.max(jnp.sum(s.stages != NO_STAGE, axis=1))

    def run(place: jax.Array, x: jax.Array) -> jax.Array:
        stage = jax.lax.dynamic_index_in_dim(s.stages, place, axis=1, keepdims=False)
        x = _when(
            stage == PENALTIES, x, lambda x, r: penalize_repetition(x, r, history, lengths, s)
        )
        x = _when(stage == TEMPERATURE, x, lambda x, rows: apply_temperature(x, rows, s))
        x = _when(stage == TOP_A, x, lambda x, rows: keep_top_a(x, rows, s))
        top_p = (stage == TOP_P) & (s.top_p < 1)
        best = (stage == TOP_K) | top_p | (stage == TFS) | (stage == TYPICAL)
        x = _when(best, x, lambda x, rows: keep_best_tokens(x, rows, stage, s))
        min_p = (stage == TOP_P) & (s.min_p > 0)
        return _when(min_p, x, lambda x, rows: keep_min_p(x, rows, s))

    return jax.lax.fori_loop(0, places, run, logits)


def _when(rows: jax.Array, x: jax.Array, sampler: Sampler) -> jax.Array:
    """The sampler's result if any row needs it."""
    return jax.lax.cond(jnp.any(rows), sampler, lambda x, _: x, x, rows)
