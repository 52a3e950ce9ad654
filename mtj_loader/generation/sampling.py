"""Samplers: greedy, or random with temperature, top-k and top-p.

Every row has its own random stream.

Axes: b batch, V vocabulary (unpadded).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtj_loader.display import show_value
from mtj_loader.errors import UsageError

NOT_FINITE = -1  # in place of a token: the row's logits were NaN or infinite
_MAX_TOKENS = 2**31 - 1  # positions are int32
_MAX_SEED = 2**64 - 1  # two uint32 words make a threefry key
_FLOAT32 = np.finfo(np.float32)


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings and the number of tokens.

    Attributes:
      max_new_tokens: the most tokens per prompt.
      temperature: divides the logits; 0 is greedy: always the most likely token.
      top_k: keep the k most likely tokens (and ties with the last of them); 0 keeps all.
      top_p: of those, keep the fewest whose probabilities sum to at least this; 1 keeps all.
      seed: 0 … 2^64 - 1, the same for every prompt, or a list with one per prompt.

    Raises:
      UsageError: a value is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        _check_integer("max_new_tokens", self.max_new_tokens, low=1, high=_MAX_TOKENS)
        _check_real("temperature", self.temperature, "a finite number, 0 or more", lambda t: t >= 0)
        _check_integer("top_k", self.top_k, low=0)
        _check_real("top_p", self.top_p, "a number over 0, at most 1", lambda p: 0 < p <= 1)
        for seed in self.seed if isinstance(self.seed, Sequence) else [self.seed]:
            _check_integer("seed", seed, low=0, high=_MAX_SEED)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always chosen."""
        return self.temperature < float(_FLOAT32.tiny)  # XLA flushes it to zero

    def seeds(self, rows: int) -> list[int]:
        """One seed per prompt.

        Raises:
          UsageError: the list of seeds and the list of prompts differ in length.
        """
        if not isinstance(self.seed, Sequence):
            return [int(self.seed)] * rows
        if len(self.seed) != rows:
            raise UsageError(
                "the list of seeds and the list of prompts differ in length",
                key="seed",
                expected=f"{rows} seeds, or one integer",
                found=len(self.seed),
            )
        return [int(seed) for seed in self.seed]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampler:
    """SamplingParams as traced arrays, so that new values need no compilation.

    Attributes:
      temperature: float32 [].
      top_k: int32 []; the vocabulary size to keep all.
      top_p: float32 [].
      keys: uint32 [b, 2], one threefry key per row.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    keys: Any


def make_sampler(params: SamplingParams, seeds: Sequence[int], vocab_size: int) -> Sampler | None:
    """The arrays that `sample` takes; None for greedy."""
    if params.greedy:
        return None
    top_k = vocab_size if params.top_k == 0 else min(params.top_k, vocab_size)
    words = [(seed >> 32, seed & 0xFFFFFFFF) for seed in seeds]  # as jax.random.key under x64
    return Sampler(
        temperature=np.float32(min(params.temperature, float(_FLOAT32.max))),
        top_k=np.int32(top_k),
        top_p=np.float32(params.top_p),
        keys=np.array(words, np.uint32),
    )


def sample(logits: jax.Array, step: jax.Array, sampler: Sampler | None) -> jax.Array:
    """Chooses one token per row.

    The choice for a row depends only on its logits, its seed and the step, so that a batch gives
    the same results as each prompt alone.

    Args:
      logits: float32 [b, V].
      step: int32 [], the number of tokens chosen before.
      sampler: None for greedy; of equal logits, the smallest id wins.

    Returns:
      int32 [b]; `NOT_FINITE` for a row whose largest logit is NaN or infinite.
    """
    largest = jnp.max(logits, axis=-1)  # NaN if any logit is
    scores = logits if sampler is None else _add_noise(logits - largest[:, None], step, sampler)
    tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.isfinite(largest), tokens, NOT_FINITE)


def filter_top_k_top_p(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Sets unlikely tokens to minus infinity: top-k first, then top-p on the rest.

    As in transformers' warpers: ties with the k-th token stay; top-p keeps the smallest set whose
    probabilities sum to at least `top_p`, and at least one token. Of tied tokens at the edge of
    that set, those with smaller ids are kept.

    Args:
      logits: float32 [b, V].
      top_k: int32 [], 1 … V.
      top_p: float32 [].

    Returns:
      float32 [b, V].
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    negated, order = jax.lax.sort((-logits, ids), num_keys=2)
    sorted_logits = -negated
    kth = jax.lax.dynamic_slice_in_dim(sorted_logits, top_k - 1, 1, axis=1)
    probabilities = jax.nn.softmax(jnp.where(sorted_logits >= kth, sorted_logits, -jnp.inf))
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of all more likely tokens
    kept = (sorted_logits >= kth) & ((before < top_p) | (top_p >= 1))
    last = jnp.maximum(jnp.sum(kept, axis=-1, keepdims=True), 1) - 1
    edge = jnp.take_along_axis(sorted_logits, last, axis=-1)
    edge_id = jnp.take_along_axis(order, last, axis=-1)
    inside = (logits > edge) | ((logits == edge) & (ids <= edge_id))
    return jnp.where(inside, logits, -jnp.inf)


def _add_noise(logits: jax.Array, step: jax.Array, sampler: Sampler) -> jax.Array:
    """Gumbel-max: the argmax of logits plus Gumbel noise is a sample from their softmax.

    The largest logit must be 0, so that dividing by a tiny temperature cannot give NaN.
    """
    vocab_size = logits.shape[-1]
    restricted = (sampler.top_k < vocab_size) | (sampler.top_p < 1)
    logits = jax.lax.cond(  # the sort is most of the work; plain temperature needs none
        restricted,
        lambda x: filter_top_k_top_p(x, sampler.top_k, sampler.top_p),
        lambda x: x,
        logits / sampler.temperature,
    )
    return logits + _gumbel_noise(sampler.keys, step, vocab_size)


def _gumbel_noise(keys: jax.Array, step: jax.Array, vocab_size: int) -> jax.Array:
    """Gumbel noise, float32 [b, V]: one stream per row, one fold per step."""

    def row(words: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, step), (vocab_size,), jnp.float32)

    return jax.vmap(row)(keys)


def _check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
        if low <= number and (high is None or number <= high):
            return
    bounds = f"{low} or more" if high is None else f"{low} to {high}"
    raise _out_of_range(name, f"an integer, {bounds}", value)


def _check_real(name: str, value: object, expected: str, fits: Callable[[float], bool]) -> None:
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):  # an integer beyond any float
            if math.isfinite(number := float(value)) and fits(number):
                return
    raise _out_of_range(name, expected, value)


def _out_of_range(name: str, expected: str, value: object) -> UsageError:
    return UsageError(
        f"{name} is out of range", key=name, expected=expected, found=show_value(value)
    )
