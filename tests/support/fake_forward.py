"""Stand-ins for `models.forward.Forward` whose tokens a test can predict.

Axes: S slots, b rows, t tokens of a pass, T cache length, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtj_loader.models.passes import Rows

STATES = 101  # a prime, so that most histories have different logits
_FLOAT32 = np.dtype(np.float32)


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

    So every token and every position affects the logits, and nothing else does. The cache is the
    tokens, int32 [S, T]: one in a wrong slot, or left from another sequence, changes what follows.

    After the token `nan_token`, logits are NaN.
    """

    config: FakeConfig
    mesh: Mesh = field(default_factory=make_mesh)
    nan_token: int = -1
    dtype: np.dtype = _FLOAT32

    def place(self, table: np.ndarray) -> dict[str, jax.Array]:
        """The parameters on the devices."""
        return {"table": jax.device_put(table, NamedSharding(self.mesh, P()))}

    def cache_shapes(self, slots: int, length: int) -> jax.ShapeDtypeStruct:
        split = NamedSharding(self.mesh, P("dp"))
        return jax.ShapeDtypeStruct((slots, length), np.int32, sharding=split)

    def frequencies(self, totals):
        return ()

    def extend(self, params, cache: jax.Array, rows: Rows):
        logits, cache = self.extend_all(params, cache, rows)
        last = jnp.maximum(rows.counts - 1, 0)[:, None, None]
        return jnp.take_along_axis(logits, last, axis=1)[:, 0], cache

    def extend_all(self, params, cache: jax.Array, rows: Rows):
        specs = P(), *[P("dp")] * 2
        run = jax.shard_map(self._extend, mesh=self.mesh, in_specs=specs, out_specs=P("dp"))
        return run(params["table"], cache, rows)

    def _extend(self, table: jax.Array, cache: jax.Array, rows: Rows):
        t, length = rows.tokens.shape[1], cache.shape[1]
        slots = rows.slots
        positions = rows.starts[:, None] + jnp.arange(t)  # [b, t]
        inside = jnp.arange(t) < rows.counts[:, None]
        places = jnp.where(inside, positions, length)
        cache = cache.at[slots[:, None], places].set(rows.tokens, mode="drop")
        terms = (1 + jnp.arange(length)) * cache[slots] % STATES
        states = jnp.cumsum(terms, axis=1) % STATES  # [b, T]
        logits = table[jnp.take_along_axis(states, jnp.minimum(positions, length - 1), axis=1)]
        return jnp.where((rows.tokens == self.nan_token)[..., None], jnp.nan, logits), cache


def hash_logits(table: np.ndarray, ids: list[int]) -> np.ndarray:
    """The logits after these tokens, [V]."""
    return table[sum((i + 1) * token for i, token in enumerate(ids)) % STATES]


def hash_tokens(table: np.ndarray, prompt: list[int], count: int) -> list[int]:
    """The greedy continuation that HashForward gives, computed one token at a time."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(np.argmax(hash_logits(table, ids))))
    return ids[len(prompt) :]


@dataclass(frozen=True)
class ScriptForward:
    """The sequence in slot i is continued by `params["script"][i]`; -1 means NaN logits.

    The first prompts of a new engine are in the first slots. The cache is the prompts' lengths,
    int32 [S]: a step runs one token of each row, and parts of prompts have room for more.
    """

    config: FakeConfig
    mesh: Mesh = field(default_factory=make_mesh)  # dp=1
    dtype: np.dtype = _FLOAT32

    def place(self, script: np.ndarray) -> dict[str, jax.Array]:
        """The parameters on the devices."""
        return {"script": jax.device_put(script, NamedSharding(self.mesh, P()))}

    def cache_shapes(self, slots: int, length: int) -> jax.ShapeDtypeStruct:
        split = NamedSharding(self.mesh, P("dp"))
        return jax.ShapeDtypeStruct((slots,), np.int32, sharding=split)

    def frequencies(self, totals):
        return ()

    def extend(self, params, cache: jax.Array, rows: Rows):
        slots = rows.slots
        ends = rows.starts + rows.counts
        if rows.tokens.shape[1] > 1:
            cache = cache.at[jnp.where(rows.counts > 0, slots, len(cache))].set(ends, mode="drop")
        script = params["script"]
        said = script[slots % len(script), jnp.clip(ends - cache[slots], 0, script.shape[1] - 1)]
        logits = 100.0 * jax.nn.one_hot(said, self.config.vocab_size)
        return jnp.where(said[:, None] < 0, jnp.nan, logits), cache

    def extend_all(self, params, cache: jax.Array, rows: Rows):
        raise NotImplementedError("scripts have no scores")
