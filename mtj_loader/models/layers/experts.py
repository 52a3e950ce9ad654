"""A mixture of experts: a router, and gated MLPs of which each token uses a few.

Every expert may be split over the shards, or whole experts dealt over them. The modules are the
same: how many experts a shard holds, and how wide they are, is declared.

  n shards   d model   f feed-forward   E experts   b batch   t time
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtj_loader.models.layers.activations import ACTIVATIONS
from mtj_loader.models.layers.parts import SHARDS, Part, contract
from mtj_loader.models.parameter_table import Declaration, Declared
from mtj_loader.parameters import ParamSpec


def expert_parameters(declare: Declaration, layer: str, *, whole: bool) -> list[ParamSpec]:
    """The parameters of `MixtureOfExperts`.

    Args:
      declare: with the sizes of all axes.
      layer: the layer's path.
      whole: deal whole experts over the shards, instead of a part of each.
    """
    split = "E" if whole else "f"
    experts = layer + "experts"
    return [
        declare.matrix(layer + "router", "w", "d", "E", split=None),
        declare.matrix(experts, "gate_up", "d", "(2 f)", split=split, each="E"),
        declare.matrix(experts, "down", "f", "d", split=split, each="E"),
    ]


class MixtureOfExperts:
    """The chosen experts' outputs, weighed by their probabilities, renormalized.

    As in Jiang et al., 2024 (arXiv:2401.04088), but with the softmax over all experts, as
    published weights expect.
    """

    def __init__(self, declared: Declared, *, activation: str, top_k: int) -> None:
        self._router = _Router(declared, top_k, name="router")
        self._experts = _Experts(declared, activation, name="experts")

    def __call__(self, x: jax.Array) -> jax.Array:  # [b, t, d] -> float32 [b, t, d]
        """This shard's term of the output."""
        return self._experts(x, self._router(x))


class _Router(Part):
    """Every expert's share in every token's output: zero for all but the likeliest `top_k`."""

    def __init__(self, declared: Declared, top_k: int, name: str) -> None:
        super().__init__(declared, name)
        self._top_k = top_k

    def __call__(self, x: jax.Array) -> jax.Array:  # [b, t, d] -> float32 [b, t, E]
        probabilities = jax.nn.softmax(self.matrix("w", x), axis=-1)
        best, numbers = jax.lax.top_k(probabilities, self._top_k)  # [b, t, top_k]
        shares = best / jnp.sum(best, axis=-1, keepdims=True)
        chosen = jax.nn.one_hot(numbers, probabilities.shape[-1])  # [b, t, top_k, E]
        return jnp.sum(shares[..., None] * chosen, axis=-2)


class _Experts(Part):
    """This shard's experts, one after another; one that no token chose is not computed."""

    def __init__(self, declared: Declared, activation: str, name: str) -> None:
        super().__init__(declared, name)
        self._activation = ACTIVATIONS[activation]

    def __call__(self, x: jax.Array, shares: jax.Array) -> jax.Array:
        """[b, t, d] and float32 [b, t, E] -> float32 [b, t, d], this shard's term."""
        gate_up, down = self.parameter("gate_up"), self.parameter("down")
        own = jnp.moveaxis(self._of_own_experts(shares, len(down)), -1, 0)

        def add(total: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            share, *weights = expert

            def added() -> jax.Array:
                return total + share[..., None] * self._expert(x, *weights)

            return jax.lax.cond(jnp.any(share != 0), added, lambda: total), None

        # Shaped like a weighed output, so that JAX knows it too to differ from shard to shard.
        nothing = jnp.zeros_like(own[0, ..., None] * x.astype(jnp.float32))
        return jax.lax.scan(add, nothing, (own, gate_up, down))[0]

    def _of_own_experts(self, shares: jax.Array, count: int) -> jax.Array:  # [b, t, count]
        """The columns of the experts that this shard holds: all, or those dealt to it."""
        first = jax.lax.axis_index(SHARDS) * count % shares.shape[-1]
        return jax.lax.dynamic_slice_in_dim(shares, first, count, axis=-1)

    def _expert(self, x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        """[b, t, d] -> float32 [b, t, d], one expert's output, or this shard's term of it."""
        inputs_axis = 1 if self._declared.transposed_linear else 0
        gate, up = jnp.split(contract(x, gate_up, inputs_axis), 2, axis=-1)
        hidden = (self._activation(gate) * up).astype(x.dtype)
        return contract(hidden, down, inputs_axis)
