"""Norms. All compute in float32 and return the dtype of their input.

n shards   d model   h heads   k head_dim
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtj_loader.models.layers.linears import SHARDS, ParameterizedModule
from mtj_loader.models.parameter_table import ParameterBuilder


class LayerNorm(ParameterizedModule):
    """Layer normalization (Ba et al., 2016, arXiv:1607.06450).

    Args:
      params: where parameters are declared.
      eps: epsilon.
      scale, offset: whether the norm has these parameters.
      axes: of these parameters; "h k" for a norm of each head with a scale of its own.
      split: the axis that is split over the shards.
      name: of the module.
    """

    def __init__(
        self,
        params: ParameterBuilder,
        eps: float,
        *,
        scale: bool = True,
        offset: bool = True,
        axes: str = "d",
        split: str | None = None,
        name: str,
    ) -> None:
        super().__init__(params, name)
        self._eps = eps
        if scale:
            self.declare("scale", axes, split)
        if offset:
            self.declare("offset", axes, split)

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., d] -> [..., d]
        """Normalizes the last axis."""
        x32 = x.astype(jnp.float32)
        centered = x32 - self.mean(x32)
        y = centered * jax.lax.rsqrt(self.mean(jnp.square(centered)) + self._eps)
        scale, offset = self.parameter32("scale"), self.parameter32("offset")
        y = y if scale is None else y * scale
        y = y if offset is None else y + offset
        return y.astype(x.dtype)

    def mean(self, x: jax.Array) -> jax.Array:  # float32 [..., d] -> float32 [..., 1]
        """The mean over the normalized axis."""
        return jnp.mean(x, axis=-1, keepdims=True)


class AllHeadsLayerNorm(LayerNorm):
    """Layer normalization over all heads at once, which are split over the shards."""

    def __init__(self, params: ParameterBuilder, eps: float, *, offset: bool, name: str) -> None:
        super().__init__(params, eps, offset=offset, axes="(h k)", split="h", name=name)

    def __call__(self, x: jax.Array) -> jax.Array:  # [b, t, h/n, k] -> [b, t, h/n, k]
        """Normalizes the last two axes."""
        return super().__call__(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)

    def mean(self, x: jax.Array) -> jax.Array:  # float32 [..., h·k/n] -> float32 [..., 1]
        """The mean over the heads of all shards."""
        return jax.lax.pmean(super().mean(x), SHARDS)


class RMSNorm(ParameterizedModule):
    """Root mean square normalization (Zhang and Sennrich, 2019, arXiv:1910.07467).

    Args:
      params: where parameters are declared.
      eps: epsilon.
      axis: what is normalized: "d" the residual stream, "k" each head.
      unit_offset: the scale is 1 + the parameter, as Gemma's files have it.
      name: of the module.
    """

    def __init__(
        self,
        params: ParameterBuilder,
        eps: float,
        *,
        axis: str = "d",
        unit_offset: bool = False,
        name: str,
    ) -> None:
        super().__init__(params, name)
        self._eps, self._unit_offset = eps, unit_offset
        self.declare("scale", axis)

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., d] -> [..., d]
        """Normalizes the last axis."""
        x32 = x.astype(jnp.float32)
        square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        scale = self.parameter("scale").astype(jnp.float32)
        scale = 1 + scale if self._unit_offset else scale
        return (x32 * jax.lax.rsqrt(square + self._eps) * scale).astype(x.dtype)
