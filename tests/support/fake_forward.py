"""Stand-ins for `models.forward.Forward` whose tokens a test can predict.

Axes: b batch, t padded prompt, T cache, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

STATES = 101  # a prime, so that most histories have different logits


@dataclass(frozen=True)
class FakeConfig:
    vocab_size: int
    max_positions: int = 512

    def cache_bytes_per_token(self, shards, dtype):
        return 4  # the cache is the ids


def make_mesh(dp: int = 1) -> Mesh:
    return Mesh(np.array(jax.devices()[:dp]).reshape(dp, 1), ("dp", "mp"))


@dataclass(frozen=True)
class HashForward:
    """Logits are a row of `params["table"]` [STATES, V], picked by the sum of position x token.

    So every token and every position affects the logits, and nothing else does. `calls` records
    the calls.
    """

    config: FakeConfig
    mesh: Mesh = field(default_factory=make_mesh)
    calls: list = field(default_factory=list)
    dtype: type = np.float32

    def prefill(self, params, ids, lengths, totals, cache_length):
        self.calls.append((ids.shape, np.asarray(totals).tolist(), cache_length))
        cache = np.pad(ids, ((0, 0), (0, cache_length - ids.shape[1])))
        return self._run(params, cache, ids[:, 0], np.zeros_like(lengths), lengths)

    def step(self, params, cache, tokens, positions):
        self.calls.append("step")
        return self._run(params, cache, tokens, positions, positions + 1)

    def _run(self, params, *arguments):
        """Places the logits like those of a real model."""
        logits, cache = _hash_step(params["table"], *arguments)
        return jax.device_put(logits, NamedSharding(self.mesh, PartitionSpec("dp"))), cache


@jax.jit
def _hash_step(table, cache, tokens, positions, lengths):
    cache = cache.at[jnp.arange(len(cache)), positions].set(tokens, mode="drop")
    places = jnp.arange(1, cache.shape[1] + 1)
    read = jnp.where(places <= lengths[:, None], places * cache, 0)
    return table[jnp.sum(read, axis=1) % STATES], cache


def hash_tokens(table: np.ndarray, prompt: list[int], count: int) -> list[int]:
    """The greedy continuation that HashForward gives, computed one token at a time."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(np.argmax(table[sum((i + 1) * t for i, t in enumerate(ids)) % STATES])))
    return ids[len(prompt) :]


@dataclass(frozen=True)
class ScriptForward:
    """Row i outputs `params["script"][i]` for any prompt; -1 means NaN logits."""

    config: FakeConfig
    mesh: Mesh = field(default_factory=make_mesh)
    calls: list = field(default_factory=list)
    dtype: type = np.float32

    def prefill(self, params, ids, lengths, totals, cache_length):
        return self._logits(params["script"][:, 0]), lengths

    def step(self, params, cache, tokens, positions):
        self.calls.append("step")
        said = np.asarray(positions) + 1 - cache
        return self._logits(params["script"][np.arange(len(said)), said]), cache

    def _logits(self, tokens):
        logits = np.zeros((len(tokens), self.config.vocab_size), np.float32)
        logits[np.arange(len(tokens)), tokens] = 100
        return np.where(tokens[:, None] < 0, np.nan, logits).astype(np.float32)
