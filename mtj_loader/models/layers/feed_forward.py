"""Feed-forward layers and activation functions.

A layer creates them in its `__init__`: their linear layers then have the layer's path.

  b batch   t time   d model   f feed-forward
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mtj_loader.models.layers.linears import Linear
from mtj_loader.models.parameter_table import ParameterBuilder

QUICK_GELU_SLOPE = 1.702  # x·sigmoid(1.702·x) approximates GELU (Hendrycks and Gimpel, 2016)

_GELU_TANH_NAMES = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def gelu(x: jax.Array) -> jax.Array:
    """x·Φ(x) by the error function (Hendrycks and Gimpel, 2016, arXiv:1606.08415)."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh approximation of GELU, from the same paper.

    `gelu_fast` writes sqrt(2/π) as 0.79788456, which is the same float32.
    """
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: jax.Array) -> jax.Array:
    """The sigmoid approximation of GELU, from the same paper."""
    return x * jax.nn.sigmoid(QUICK_GELU_SLOPE * x)


# By the names that Hugging Face configs use.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    **dict.fromkeys(_GELU_TANH_NAMES, gelu_tanh),
    "quick_gelu": quick_gelu,
    "relu": lambda x: jnp.maximum(x, 0),
    "silu": jax.nn.silu,
}


class MLP:
    """Two linear layers with an activation between."""

    def __init__(self, params: ParameterBuilder, activation: str, *, bias: bool = True) -> None:
        self._activation = ACTIVATIONS[activation]
        self._up = Linear(params, "d", "f", split="f", bias=bias, name="linear_4")
        self._down = Linear(params, "f", "d", split="f", bias=bias, name="linear_5")

    def __call__(self, x: jax.Array) -> jax.Array:  # [b, t, d] -> float32 [b, t, d]
        """This shard's term of the output."""
        return self._down(self.hidden(x).astype(x.dtype))

    def hidden(self, x: jax.Array) -> jax.Array:  # [b, t, d] -> float32 [b, t, f/n]
        """The input of the down projection."""
        return self._activation(self._up(x))


class GatedMLP(MLP):
    """The down projection of activation(gate) · up (Shazeer, 2020, arXiv:2002.05202).

    MTJ's name for the gate is `linear_4`, and `linear_6` for the up projection.
    """

    def __init__(self, params: ParameterBuilder, activation: str, *, bias: bool = False) -> None:
        super().__init__(params, activation, bias=bias)
        self._gated_up = Linear(params, "d", "f", split="f", bias=bias, name="linear_6")

    def hidden(self, x: jax.Array) -> jax.Array:  # [b, t, d] -> float32 [b, t, f/n]
        """The input of the down projection."""
        return super().hidden(x) * self._gated_up(x)
