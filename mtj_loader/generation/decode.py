"""The decode loop: a batch of prompts in, tokens out, one step of the device at a time.

Axes: b batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered

from mtj_loader.generation.batch import Batch, Shape
from mtj_loader.generation.sampling import Sampler, SamplingParams, make_sampler, sample
from mtj_loader.models.forward import Forward, Params, Tree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Where a batch stands between two steps. A step makes a new one and leaves this as it is.

    The cache is kept beside it: a step donates the cache, while the host still reads these tokens.

    Attributes:
      tokens: int32 [b], chosen last; they are not in the cache yet.
      positions: int32 [b], where in their rows they stand.
      step: int32 [], how many tokens were chosen so far; numbers the draws of the random streams.
    """

    tokens: jax.Array
    positions: jax.Array
    step: jax.Array


def decode(
    forward: Forward,
    params: Params,
    batch: Batch,
    sampler: Sampler | None,
    max_new_tokens: int,
    *,
    before_step: Callable[[], object] = lambda: None,
) -> Iterator[np.ndarray]:
    """Yields the next token of every row, int32 [b], `max_new_tokens` times.

    The device works one step ahead of the caller, so that what the caller does with a token costs
    no time; whoever stops asking early wastes that step. The first token is not kept waiting for
    the compilation of the next; `before_step` is called between both.
    """
    states = _states(forward, params, batch, sampler, max_new_tokens)
    yield np.asarray(next(states).tokens)
    before_step()
    for state in _one_ahead(states):
        yield np.asarray(state.tokens)


@dataclass(frozen=True)
class Programs:
    """All that `decode` runs for a shape, to be compiled before it is needed.

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
        """The choice of a token by chance."""
        drawn = make_sampler(SamplingParams(), [0] * self.shape.rows, self._logits.shape[-1])
        return self._choice(jax.tree.map(partial(_abstract, self._everywhere), drawn))

    def step(self) -> Lowered:
        """The pass over one more token."""
        _, cache = self._prefill.out_info
        return self.forward.lower_step(self.params, cache, self._numbers((self.shape.rows,)))

    @cached_property
    def _prefill(self) -> Lowered:
        return self.forward.lower_prefill(
            self.params, self.shape.rows, self.shape.prompt, self.shape.cache
        )

    def _choice(self, sampler: Tree) -> Lowered:
        numbers = self._numbers((self.shape.rows,))
        state = DecodeState(numbers, numbers, self._numbers(()))
        return _choose.lower(self.forward.mesh, self._logits, state, sampler)

    @property
    def _logits(self) -> Tree:
        return self._prefill.out_info[0]

    @property
    def _everywhere(self) -> NamedSharding:
        return NamedSharding(self.forward.mesh, PartitionSpec())

    def _numbers(self, shape: tuple[int, ...]) -> Tree:
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=self._everywhere)


def _abstract(sharding: NamedSharding, array: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _states(
    forward: Forward, params: Params, batch: Batch, sampler: Sampler | None, max_new_tokens: int
) -> Iterator[DecodeState]:
    """The states after each choice; asking for one dispatches its work without waiting for it."""
    nothing = np.zeros_like(batch.lengths), batch.lengths - 1, np.int32(0)
    everywhere = NamedSharding(forward.mesh, PartitionSpec())
    *before, sampler = jax.device_put((*nothing, sampler), everywhere)
    state = DecodeState(*before)
    logits, cache = forward.prefill(
        params, batch.ids, batch.lengths, batch.totals, batch.cache_length
    )
    for chosen in range(1, max_new_tokens + 1):
        state = _choose(forward.mesh, logits, state, sampler)
        yield state
        if chosen < max_new_tokens:
            logits, cache = forward.step(params, cache, state.tokens, state.positions)


@partial(jax.jit, static_argnames="mesh")
def _choose(
    mesh: Mesh, logits: jax.Array, state: DecodeState, sampler: Sampler | None
) -> DecodeState:
    """Appends the tokens that the logits [b, V] call for.

    Compiled apart from the model, so that greedy text and sampled text share the model's step; two
    dispatches run as fast as one, for nobody waits between them. The result is on every device:
    each host reads the tokens.
    """
    tokens = sample(logits, state.step, sampler)
    chosen = DecodeState(tokens, state.positions + 1, state.step + 1)
    return jax.lax.with_sharding_constraint(chosen, NamedSharding(mesh, PartitionSpec()))


def _one_ahead(states: Iterator[DecodeState]) -> Iterator[DecodeState]:
    """The same states, each yielded after the next was asked for."""
    previous = next(states, None)
    for state in states:
        if previous is not None:
            yield previous
        previous = state
    if previous is not None:
        yield previous
