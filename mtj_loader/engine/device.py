"""What the devices compute: parts of prompts, steps of decoding, and choices of tokens.

A step and the choice after it are two programs, because choosing takes as long to compile as a
small model, and the same choice serves after prompts. A round is both, several times.

Axes: S slots, b rows, t tokens of a chunk, T cache length, V vocabulary, k steps,
W = ceil(V / 32) words of a bitmask, p words of a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtj_loader.models.config import ModelConfig
from mtj_loader.models.passes import Cache, Rows
from mtj_loader.sampling.choose import Choice
from mtj_loader.sampling.choose import choose as choose_tokens
from mtj_loader.sampling.params import MAX_LOGPROBS
from mtj_loader.sampling.result import pack
from mtj_loader.sampling.row_settings import RowSettings

Tree = Any  # a pytree of arrays
Params = Any  # the model's parameters
_ROWS = P("dp")


class Extends(Protocol):
    """What the engine runs: a `Forward`, whose methods these are, or a stand-in of a test."""

    @property
    def config(self) -> ModelConfig:
        """The sizes of the model."""
        ...

    @property
    def mesh(self) -> Mesh:
        """Its devices."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Of the cache."""
        ...

    def cache_shapes(self, slots: int, length: int) -> Tree:
        """The shapes of the cache's arrays."""
        ...

    def frequencies(self, totals: Sequence[int]) -> tuple[Tree, ...]:
        """The frequencies of rows of these lengths."""
        ...

    def extend(self, params: Params, cache: Tree, rows: Rows) -> tuple[jax.Array, Tree]:
        """Runs tokens; the logits after the last ones, and the cache."""
        ...

    def extend_all(self, params: Params, cache: Tree, rows: Rows) -> tuple[jax.Array, Tree]:
        """Runs tokens; the logits after every one, and the cache."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What stays on the devices between programs, which replace it; all split over dp.

    Attributes:
      cache: keys and values.
      tokens: int32 [S, T], of the sequences, chosen ones included.
      logits: float32 [S, V], after the last tokens that ran.
      mu: float32 [S], mirostat's state.
    """

    cache: Cache
    tokens: Any
    logits: Any
    mu: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotSettings:
    """What the requests in the slots ask for; all split over dp.

    Attributes:
      sampling: arrays [S, …].
      frequencies: of each rotary embedding, float32 [S, r/2].
    """

    sampling: RowSettings
    frequencies: tuple[Any, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Steps:
    """Where the sequences of some rows are, int32 [b] each.

    Attributes:
      slots: of each row in its group; as many as the group has for rows that do not run.
      lengths: of the sequences; a step runs the last token.
      steps: how many tokens were chosen for the request before.
      active: 1, or 0 for a row that does not run.
    """

    slots: Any
    lengths: Any
    steps: Any
    active: Any


def prefill(
    forward: Extends, params: Params, state: State, settings: SlotSettings, rows: Rows
) -> tuple[State, jax.Array]:
    """Runs a part of the prompts of some slots.

    Args:
      forward: the model.
      params: its parameters.
      state: of all slots.
      settings: of all slots.
      rows: the parts of the prompts; without frequencies, which are those of the slots.

    Returns:
      The state with the logits of these slots, and int32 [b], which is ready when that is.
    """
    frequencies = _take_rows(forward, settings.frequencies, rows.slots)
    rows = replace(rows, frequencies=frequencies)
    logits, cache = forward.extend(params, state.cache, rows)
    state = _write_prompts(forward, replace(state, cache=cache), rows, logits)
    return state, rows.counts + 0


def score(  # noqa: PLR0917
    forward: Extends,
    params: Params,
    state: State,
    settings: SlotSettings,
    rows: Rows,
    following: jax.Array,
) -> tuple[State, jax.Array]:
    """Like `prefill`, with the log-probabilities of tokens of the prompts.

    Args:
      forward: the model.
      params: its parameters.
      state: of all slots.
      settings: of all slots.
      rows: the parts of the prompts; without frequencies, which are those of the slots.
      following: int32 [b, t], the token that follows each.

    Returns:
      The state, and results int32 [t, b, p] for the following tokens; see `sampling.result`.
    """
    frequencies = _take_rows(forward, settings.frequencies, rows.slots)
    rows = replace(rows, frequencies=frequencies)
    logits, cache = forward.extend_all(params, state.cache, rows)

    def pack_all(logits: jax.Array, following: jax.Array) -> jax.Array:
        logprobs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(logprobs, following[..., None], axis=-1)[..., 0]
        top, ids = jax.lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[-1]))
        return jnp.moveaxis(pack(Choice(following, chosen, ids, top, None)), 1, 0)

    last = jnp.maximum(rows.counts - 1, 0)[:, None, None]
    final = jnp.take_along_axis(logits, last, axis=1)[:, 0]
    state = _write_prompts(forward, replace(state, cache=cache), rows, final)
    packed = _on_rows(forward, pack_all, outputs=P(None, "dp"))(logits, following)
    return state, _replicated(forward, packed)


def step(
    forward: Extends, params: Params, state: State, settings: SlotSettings, steps: Steps
) -> tuple[State, jax.Array]:
    """Runs the last tokens of some sequences.

    Args:
      forward: the model.
      params: its parameters.
      state: of all slots.
      settings: of all slots.
      steps: of the sequences.

    Returns:
      The state with the logits of their slots, and int32 [b], which is ready when that is.
    """
    frequencies = _take_rows(forward, settings.frequencies, steps.slots)
    rows = _last_tokens(forward, state.tokens, steps, frequencies)
    logits, cache = forward.extend(params, state.cache, rows)
    stored = _store_logits(forward, state.logits, rows, logits)
    return replace(state, cache=cache, logits=stored), steps.active + 0


def choose(  # noqa: PLR0917
    forward: Extends,
    tokens: jax.Array,
    mu: jax.Array,
    logits: jax.Array,
    settings: RowSettings,
    steps: Steps,
    allowed: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Chooses the next tokens of some sequences from the logits after their last ones.

    Args:
      forward: the model.
      tokens: of the state.
      mu: of the state.
      logits: of the state.
      settings: of all slots.
      steps: of the sequences.
      allowed: uint32 [b, W], what the grammars and bans allow.

    Returns:
      The new tokens and mu, and results int32 [1, b, p], see `sampling.result`.
    """
    sampling = _take_rows(forward, settings, steps.slots)
    of_rows = _take_rows(forward, logits, steps.slots)
    run = _on_rows(forward, _choose, outputs=(_ROWS, _ROWS, _ROWS))
    tokens, mu, packed = run(of_rows, sampling, tokens, mu, steps, allowed)
    return (tokens, mu), _replicated(forward, packed[None])


def decode(
    forward: Extends,
    params: Params,
    state: State,
    settings: SlotSettings,
    steps: Steps,
    *,
    count: int,
) -> tuple[State, jax.Array]:
    """Chooses several tokens for some sequences, with a step before each.

    Args:
      forward: the model.
      params: its parameters.
      state: of all slots.
      settings: of all slots.
      steps: of the sequences.
      count: k, how many tokens; static.

    Returns:
      The state, and results int32 [k, b, p].
    """
    sampling = _take_rows(forward, settings.sampling, steps.slots)
    frequencies = _take_rows(forward, settings.frequencies, steps.slots)

    def choose_next(
        logits: jax.Array, sampling: RowSettings, tokens: jax.Array, mu: jax.Array, steps: Steps
    ) -> tuple[jax.Array, ...]:
        return _choose(logits, sampling, tokens, mu, steps, None)

    def one(carry: Tree, _: None) -> tuple[Tree, jax.Array]:
        cache, tokens, mu, steps = carry
        rows = _last_tokens(forward, tokens, steps, frequencies)
        logits, cache = forward.extend(params, cache, rows)
        run = _on_rows(forward, choose_next, outputs=(_ROWS, _ROWS, _ROWS))
        tokens, mu, packed = run(logits, sampling, tokens, mu, steps)
        lengths, chosen = steps.lengths + steps.active, steps.steps + steps.active
        return (cache, tokens, mu, Steps(steps.slots, lengths, chosen, steps.active)), packed

    start = state.cache, state.tokens, state.mu, steps
    (cache, tokens, mu, _), packed = jax.lax.scan(one, start, None, length=count)
    return replace(state, cache=cache, tokens=tokens, mu=mu), _replicated(forward, packed)


def _choose(  # noqa: PLR0917
    logits: jax.Array,
    settings: RowSettings,
    tokens: jax.Array,
    mu: jax.Array,
    steps: Steps,
    allowed: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Chooses for the rows of one group.

    Args:
      logits: float32 [b, V].
      settings: of the rows.
      tokens: of all slots.
      mu: of all slots.
      steps: of the rows.
      allowed: uint32 [b, W]; None for everything.

    Returns:
      The tokens and mu with the choices, and results int32 [b, p].
    """
    slots, lengths = steps.slots, steps.lengths
    start = jnp.where(steps.steps > 0, mu[slots], settings.initial_mu)
    history = tokens[slots]
    choice = choose_tokens(
        logits, settings, history, lengths, steps.steps, start, allowed, top=MAX_LOGPROBS
    )
    slots = jnp.where(steps.active > 0, slots, len(tokens))
    # A choice that is no token ends the request; the model still needs a token to run.
    tokens = tokens.at[slots, lengths].set(jnp.maximum(choice.tokens, 0), mode="drop")
    return tokens, mu.at[slots].set(choice.mu, mode="drop"), pack(choice)


def _take_rows(forward: Extends, of_slots: Tree, slots: jax.Array) -> Tree:
    def take(of_slots: Tree, slots: jax.Array) -> Tree:
        return jax.tree.map(lambda x: x[slots], of_slots)

    return _on_rows(forward, take)(of_slots, slots)


def _last_tokens(forward: Extends, tokens: jax.Array, steps: Steps, frequencies: Tree) -> Rows:
    def read(tokens: jax.Array, steps: Steps) -> jax.Array:
        return tokens[steps.slots, steps.lengths - 1][:, None]

    last = _on_rows(forward, read)(tokens, steps)
    return Rows(last, steps.lengths - 1, steps.active, frequencies, steps.slots)


def _write_prompts(forward: Extends, state: State, rows: Rows, logits: jax.Array) -> State:
    """Stores the tokens of a chunk and the logits after it."""

    def write(tokens: jax.Array, rows: Rows) -> jax.Array:
        offsets = jnp.arange(rows.tokens.shape[1])
        inside = offsets < rows.counts[:, None]
        places = jnp.where(inside, rows.starts[:, None] + offsets, tokens.shape[1])
        return tokens.at[rows.slots[:, None], places].set(rows.tokens, mode="drop")

    tokens = _on_rows(forward, write)(state.tokens, rows)
    return replace(state, tokens=tokens, logits=_store_logits(forward, state.logits, rows, logits))


def _store_logits(forward: Extends, stored: jax.Array, rows: Rows, new: jax.Array) -> jax.Array:
    def write(stored: jax.Array, rows: Rows, new: jax.Array) -> jax.Array:
        slots = jnp.where(rows.counts > 0, rows.slots, len(stored))
        return stored.at[slots].set(new, mode="drop")

    return _on_rows(forward, write)(stored, rows, new)


def _on_rows(
    forward: Extends, body: Callable[..., Any], *, outputs: Tree = _ROWS
) -> Callable[..., Any]:
    """A function of the rows of one group, as one of all rows."""
    return jax.shard_map(body, mesh=forward.mesh, in_specs=_ROWS, out_specs=outputs)


def _replicated(forward: Extends, packed: jax.Array) -> jax.Array:
    """The same on all devices: every host reads it."""
    return jax.lax.with_sharding_constraint(packed, NamedSharding(forward.mesh, P()))
