"""The result of a choice as one row of words, so that a round has one array for the host.

Axis: p = 2 + 2 · top words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mtj_loader.sampling.choose import Choice
from mtj_loader.sampling.params import MAX_LOGPROBS


@dataclass(frozen=True)
class Chosen:
    """A token that was chosen, or one of a prompt that was scored.

    Attributes:
      token: its id; or `choose.NOT_FINITE` or `choose.NO_TOKEN`.
      logprob: its log-probability under the model; NaN where it was not asked for.
      top: the most likely tokens with theirs; empty where they were not asked for.
    """

    token: int
    logprob: float = float("nan")
    top: tuple[tuple[int, float], ...] = ()


def words_of_result(vocab_size: int) -> int:
    """p, the words of a result."""
    return 2 + 2 * min(MAX_LOGPROBS, vocab_size)


def pack(choice: Choice) -> jax.Array:
    """The choices of b rows as words, int32 [b, p]."""
    words = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.int32)
    parts = [
        choice.tokens[..., None],
        words(choice.logprobs)[..., None],
        choice.top_ids,
        words(choice.top_logprobs),
    ]
    return jnp.concatenate(parts, axis=-1)


def unpack(words: np.ndarray, top: int) -> Chosen:
    """Reads the words of one row, int32 [p], with at most `top` of the most likely tokens."""
    ids, values = np.split(words[2:], 2)
    pairs = zip(ids[:top].tolist(), values[:top].view(np.float32).tolist(), strict=True)
    found = tuple((i, value) for i, value in pairs if i >= 0)
    return Chosen(int(words[0]), float(words[1:2].view(np.float32)[0]), found)
