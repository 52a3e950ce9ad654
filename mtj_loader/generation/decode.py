"""The decoding loop: a batch of prompts in, tokens out, one step at a time.

Axes: b batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, pairwise

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered

from mtj_loader.distributed.host_group import call_on_devices
from mtj_loader.generation.prompts import PromptBatch, Shape
from mtj_loader.generation.sampling import Sampler, SamplingParams, make_sampler, sample
from mtj_loader.models.forward import Forward, Params, Tree, dispatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """The state of a batch between two steps; immutable.

    The KV cache is separate: a step donates the cache while the host still reads these tokens.

    Attributes:
      tokens: int32 [b], the last chosen ones; not in the cache yet.
      positions: int32 [b], their positions in the rows.
      step: int32 [], the number of tokens chosen so far; the counter of the random streams.
    """

    tokens: jax.Array
    positions: jax.Array
    step: jax.Array


def decode(
    forward: Forward,
    params: Params,
    batch: PromptBatch,
    sampler: Sampler | None,
    max_new_tokens: int,
    *,
    before_step: Callable[[], object] = lambda: None,
) -> Iterator[np.ndarray]:
    """Yields the next token of every row, int32 [b], `max_new_tokens` times.

    The device computes one step ahead of the caller, so that the caller's work on a token overlaps
    with the next step; stopping early wastes that step. `before_step` is called after the first
    token, which does not wait for the compilation of the step.

    Raises:
      HostError: another host of the same session failed.
    """
    states = _states(forward, params, batch, sampler, max_new_tokens)
    yield call_on_devices(lambda: np.asarray(next(states).tokens))
    before_step()
    ahead = _one_ahead(states)
    for _ in range(1, max_new_tokens):
        yield call_on_devices(lambda: np.asarray(next(ahead).tokens))


@dataclass(frozen=True)
class Programs:
    """All programs that `decode` runs for a shape, lowered so that they can be compiled ahead.

    Attributes:
      forward: the model.
      params: shapes, dtypes and shardings of the parameters.
      shape: of the batches.
    """

    forward: Forward
    params: Tree
    shape: Shape

    def prefill(self) -> Lowered:
        """The pass over the prompts."""
        return self._prefill

    def greedy(self) -> Lowered:
        """The choice of the likeliest token."""
        return self._choice(None)

    def sampled(self) -> Lowered:
        """The choice of a random token."""
        sampler = make_sampler(SamplingParams(), [0] * self.shape.rows, self._logits.shape[-1])
        return self._choice(jax.tree.map(partial(_abstract, self._replicated), sampler))

    def step(self) -> Lowered:
        """The pass over one more token."""
        _, cache = self._prefill.out_info
        return self.forward.lower_step(self.params, cache, self._int32s((self.shape.rows,)))

    @cached_property
    def _prefill(self) -> Lowered:
        return self.forward.lower_prefill(
            self.params, self.shape.rows, self.shape.prompt, self.shape.cache
        )

    def _choice(self, sampler: Tree) -> Lowered:
        numbers = self._int32s((self.shape.rows,))
        state = DecodeState(numbers, numbers, self._int32s(()))
        return _choose.lower(self.forward.mesh, self._logits, state, sampler)

    @property
    def _logits(self) -> Tree:
        return self._prefill.out_info[0]

    @property
    def _replicated(self) -> NamedSharding:
        return NamedSharding(self.forward.mesh, PartitionSpec())

    def _int32s(self, shape: tuple[int, ...]) -> Tree:
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=self._replicated)


def _abstract(sharding: NamedSharding, array: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _states(
    forward: Forward,
    params: Params,
    batch: PromptBatch,
    sampler: Sampler | None,
    max_new_tokens: int,
) -> Iterator[DecodeState]:
    """The state after each choice; each iteration dispatches work without waiting for it."""
    initial = np.zeros_like(batch.lengths), batch.lengths - 1, np.int32(0)
    replicated = NamedSharding(forward.mesh, PartitionSpec())
    *initial, sampler = jax.device_put((*initial, sampler), replicated)
    state = DecodeState(*initial)
    logits, cache = forward.prefill(
        params, batch.ids, batch.lengths, batch.totals, batch.cache_length
    )
    for chosen in range(1, max_new_tokens + 1):
        state = dispatch(forward.mesh, partial(_choose, forward.mesh), logits, state, sampler)
        yield state
        if chosen < max_new_tokens:
            logits, cache = forward.step(params, cache, state.tokens, state.positions)


@partial(jax.jit, static_argnames="mesh")
def _choose(
    mesh: Mesh, logits: jax.Array, state: DecodeState, sampler: Sampler | None
) -> DecodeState:
    """Chooses the next tokens from the logits [b, V].

    A program of its own, so that greedy and sampled decoding share the model's step; two dispatches
    are as fast as one, since nothing waits between them. The result is on every device, because
    each host reads the tokens.
    """
    tokens = sample(logits, state.step, sampler)
    chosen = DecodeState(tokens, state.positions + 1, state.step + 1)
    return jax.lax.with_sharding_constraint(chosen, NamedSharding(mesh, PartitionSpec()))


def _one_ahead(states: Iterator[DecodeState]) -> Iterator[DecodeState]:
    """The same states, each yielded after the next one was requested."""
    return (state for state, _ in pairwise(chain(states, [None])) if state is not None)
