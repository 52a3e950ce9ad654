"""Activation functions, by the names that Hugging Face configs use."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

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


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    **dict.fromkeys(_GELU_TANH_NAMES, gelu_tanh),
    "quick_gelu": quick_gelu,
    "relu": lambda x: jnp.maximum(x, 0),
    "silu": jax.nn.silu,
}
