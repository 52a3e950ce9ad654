"""Chooses the next token of every row from the model's logits.

Axes: b rows, V vocabulary (unpadded), T length of the history, W = ceil(V / 32).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mtj_loader.sampling.chain import apply_samplers
from mtj_loader.sampling.draw import LEVELS, draw, uniforms
from mtj_loader.sampling.dry import penalize_sequences
from mtj_loader.sampling.penalties import update_tokens
from mtj_loader.sampling.row_settings import RowSettings
from mtj_loader.sampling.truncation import exclude_top_choices, keep_below_surprise

NOT_FINITE = -1  # in place of a token: the row's logits were NaN or infinite
NO_TOKEN = -2  # in place of a token: bans or the grammar leave none


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
      tokens: int32 [b]; or `NOT_FINITE` or `NO_TOKEN`.
      logprobs: float32 [b], of the tokens: natural logarithms of the softmax of the model's own
        logits; NaN where the row did not ask or no token was chosen.
      top_ids: int32 [b, top], the most likely tokens, -1 where the row did not ask.
      top_logprobs: float32 [b, top], theirs; NaN where the row did not ask.
      mu: float32 [b], mirostat's new state.
    """

    tokens: Any
    logprobs: Any
    top_ids: Any
    top_logprobs: Any
    mu: Any


def choose(  # noqa: PLR0917
    logits: jax.Array,
    settings: RowSettings,
    history: jax.Array,
    lengths: jax.Array,
    steps: jax.Array,
    mu: jax.Array,
    allowed: jax.Array | None,
    top: int,
) -> Choice:
    """Chooses one token per row. A row's choice depends on nothing but the row's own inputs.

    Args:
      logits: float32 [b, V].
      settings: of the rows.
      history: int32 [b, T], the tokens so far, prompt included.
      lengths: int32 [b], how many of them are valid; the rest may contain anything.
      steps: int32 [b], the number of tokens chosen for the request before; the counter of its
        random stream.
      mu: float32 [b], mirostat's state.
      allowed: uint32 [b, W], the tokens that a grammar allows: bit t % 32 of word t // 32, and all
        bits of a row without a grammar; None if no row has one.
      top: how many of the most likely tokens to report, at most V; static.
    """
    # NaN as infinity: on CPUs the maximum of a wide row may be a number although a logit is NaN.
    largest = jnp.max(jnp.where(logits < jnp.inf, logits, jnp.inf), axis=1)
    finite = jnp.isfinite(largest)
    scores, left = _mask(_add_bias(logits, settings), settings, steps, allowed)
    # Rows that are not finite or have no token left go on, and their results are not used.
    scores = _penalize_sequences(scores, history, lengths, settings)
    scores = apply_samplers(scores, history, lengths, settings)
    uniform = uniforms(settings.key, steps, LEVELS + 1)
    scores = _exclude_top_choices(scores, uniform[:, LEVELS], settings)
    scores = _keep_below_surprise(scores, mu, settings)
    tokens, surprise_mu = _draw(scores, uniform[:, :LEVELS], mu, settings)
    tokens = jnp.where(left, tokens, NO_TOKEN)
    tokens = jnp.where(finite, tokens, NOT_FINITE)
    mu = jnp.where(settings.mirostat & (tokens >= 0), surprise_mu, mu)
    logprobs, top_ids, top_logprobs = _log_probabilities(logits, tokens, top, settings)
    return Choice(tokens, logprobs, top_ids, top_logprobs, mu)


def _add_bias(scores: jax.Array, s: RowSettings) -> jax.Array:
    return jax.lax.cond(
        jnp.any(s.bias_values != 0),
        lambda x: update_tokens(x, s.bias_ids, s.bias_values, "add"),
        lambda x: x,
        scores,
    )


def _mask(
    scores: jax.Array, s: RowSettings, steps: jax.Array, allowed: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Minus infinity for tokens that are banned, too early, or not allowed.

    Returns:
      float32 [b, V], and whether any token is left, bool [b].
    """
    early = jnp.where((steps < s.min_new_tokens)[:, None], s.eos, 0)
    forbidden = s.banned | early | (0 if allowed is None else ~allowed)

    def apply(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        bits = (forbidden[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        bits = bits.reshape(x.shape[0], -1)[:, : x.shape[1]]
        masked = jnp.where(bits == 1, -jnp.inf, x)
        return masked, jnp.max(masked, axis=1) > -jnp.inf

    def keep(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x, jnp.full_like(steps, True, dtype=bool)

    return jax.lax.cond(jnp.any(forbidden != 0), apply, keep, scores)


def _penalize_sequences(
    scores: jax.Array, history: jax.Array, lengths: jax.Array, s: RowSettings
) -> jax.Array:
    rows = s.dry_multiplier > 0
    return jax.lax.cond(
        jnp.any(rows),
        lambda x: penalize_sequences(x, rows, history, lengths, s),
        lambda x: x,
        scores,
    )


def _exclude_top_choices(scores: jax.Array, uniform: jax.Array, s: RowSettings) -> jax.Array:
    rows = s.xtc_probability > 0
    return jax.lax.cond(
        jnp.any(rows),
        lambda x: exclude_top_choices(x, rows, uniform, s),
        lambda x: x,
        scores,
    )


def _keep_below_surprise(scores: jax.Array, mu: jax.Array, s: RowSettings) -> jax.Array:
    return jax.lax.cond(
        jnp.any(s.mirostat),
        lambda x: keep_below_surprise(x, s.mirostat, mu),
        lambda x: x,
        scores,
    )


def _draw(
    scores: jax.Array, uniform: jax.Array, mu: jax.Array, s: RowSettings
) -> tuple[jax.Array, jax.Array]:
    """The tokens, int32 [b], and mirostat's next state, float32 [b].

    A greedy row draws with weights that leave only the first of the largest scores.
    """
    below = scores - jnp.max(scores, axis=1, keepdims=True)
    greedy = s.greedy[:, None]
    weights = jnp.where(greedy, below == 0, jnp.exp(below))
    tokens = draw(weights, jnp.where(greedy, 0, uniform))

    def update(mu: jax.Array) -> jax.Array:
        chosen = jnp.take_along_axis(below, tokens[:, None], axis=1)[:, 0]
        surprise = jnp.log2(jnp.sum(jnp.exp(below), axis=1)) - chosen / jnp.log(2.0)
        return mu - s.mirostat_eta * (surprise - s.mirostat_tau)

    return tokens, jax.lax.cond(jnp.any(s.mirostat), update, lambda mu: mu, mu)


def _log_probabilities(
    logits: jax.Array, tokens: jax.Array, top: int, s: RowSettings
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the chosen tokens [b] and of the top ones, their ids [b, top] and log-probabilities."""
    top = min(top, logits.shape[1])

    def compute() -> tuple[jax.Array, jax.Array, jax.Array]:
        total = jax.nn.logsumexp(logits, axis=1, keepdims=True)
        chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], axis=1) - total
        top_logits, top_ids = jax.lax.top_k(logits, top)
        asked = (s.logprobs & (tokens >= 0))[:, None]
        return (
            jnp.where(asked, chosen, jnp.nan)[:, 0],
            jnp.where(asked, top_ids, -1),
            jnp.where(asked, top_logits - total, jnp.nan),
        )

    def nothing() -> tuple[jax.Array, jax.Array, jax.Array]:
        absent = jnp.full_like(logits[:, :top], jnp.nan)
        return jnp.full_like(logits[:, 0], jnp.nan), jnp.full_like(absent, -1, jnp.int32), absent

    return jax.lax.cond(jnp.any(s.logprobs), compute, nothing)
