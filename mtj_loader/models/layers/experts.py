"""A mixture of experts: a router, and gated MLPs of which each token uses a few.

Either every expert is split over the shards, or whole experts are distributed over them
(expert-parallel).

  n shards   d model   f feed-forward   E experts   b batch   t time
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtj_loader.models.layers.feed_forward import ACTIVATIONS
from mtj_loader.models.layers.linears import SHARDS, ParameterizedModule, contract
from mtj_loader.models.parameter_table import ParameterBuilder


class MixtureOfExperts:
    """The sum of the chosen experts' outputs, weighted by their renormalized probabilities.

    As in Jiang et al., 2024 (arXiv:2401.04088), but with the softmax over all experts, as
    published weights expect.

    Args:
      params: where parameters are declared.
      activation: of the gate.
      top_k: how many experts each token uses.
      expert_parallel: distribute whole experts over the shards, instead of splitting each.
    """

    def __init__(
        self, params: ParameterBuilder, *, activation: str, top_k: int, expert_parallel: bool
    ) -> None:
        split = "E" if expert_parallel else "f"
        self._router = _Router(params, top_k, name="router")
        self._experts = _Experts(params, activation, split, name="experts")

    def __call__(self, x: jax.Array) -> jax.Array:  # [b, t, d] -> float32 [b, t, d]
        """This shard's term of the output."""
        return self._experts(x, self._router(x))


class _Router(ParameterizedModule):
    """Every expert's weight in every token's output: zero for all but the likeliest `top_k`."""

    def __init__(self, params: ParameterBuilder, top_k: int, name: str) -> None:
        super().__init__(params, name)
        self._top_k = top_k
        self.declare_matrix("w", ins="d", outs="E", split=None)

    def __call__(self, x: jax.Array) -> jax.Array:  # [b, t, d] -> float32 [b, t, E]
        probabilities = jax.nn.softmax(self.matmul(x, "w"), axis=-1)
        best, indices = jax.lax.top_k(probabilities, self._top_k)  # [b, t, top_k]
        shares = best / jnp.sum(best, axis=-1, keepdims=True)
        chosen = jax.nn.one_hot(indices, probabilities.shape[-1])  # [b, t, top_k, E]
        return jnp.sum(shares[..., None] * chosen, axis=-2)


class _Experts(ParameterizedModule):
    """This shard's experts, one after another; an expert that no token chose is skipped."""

    def __init__(self, params: ParameterBuilder, activation: str, split: str, name: str) -> None:
        super().__init__(params, name)
        self._activation = ACTIVATIONS[activation]
        self.declare_matrix("gate_up", ins="d", outs="(2 f)", split=split, stack="E")
        self.declare_matrix("down", ins="f", outs="d", split=split, stack="E")

    def __call__(self, x: jax.Array, shares: jax.Array) -> jax.Array:
        """[b, t, d] and float32 [b, t, E] -> float32 [b, t, d], this shard's term."""
        gate_up, down = self.parameter("gate_up"), self.parameter("down")
        own = jnp.moveaxis(self._own_columns(shares, len(down)), -1, 0)

        def add(total: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            share, *weights = expert

            def added() -> jax.Array:
                return total + share[..., None] * self._expert(x, *weights)

            return jax.lax.cond(jnp.any(share != 0), added, lambda: total), None

        # Computed from the inputs, so that JAX knows that it varies over the shards.
        nothing = jnp.zeros_like(own[0, ..., None] * x.astype(jnp.float32))
        return jax.lax.scan(add, nothing, (own, gate_up, down))[0]

    def _own_columns(self, shares: jax.Array, count: int) -> jax.Array:  # [b, t, count]
        """The columns of the experts that this shard holds: all of them, or its own few."""
        first = jax.lax.axis_index(SHARDS) * count % shares.shape[-1]
        return jax.lax.dynamic_slice_in_dim(shares, first, count, axis=-1)

    def _expert(self, x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        """[b, t, d] -> float32 [b, t, d], one expert's output, or this shard's term of it."""
        gate, up = jnp.split(contract(x, gate_up, self.inputs_axis), 2, axis=-1)
        hidden = (self._activation(gate) * up).astype(x.dtype)
        return contract(hidden, down, self.inputs_axis)
