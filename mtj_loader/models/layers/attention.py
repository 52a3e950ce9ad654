"""The attention of a layer: projections, norms and rotary embedding around `attend`.

A layer creates an attention in its `__init__`: its linear layers then have the layer's path.

  b rows   t time   d model   h heads of one shard   k head_dim
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtj_loader.models.layers.attend import KVCache, ScoreBias, attend, update_cache
from mtj_loader.models.layers.linears import Linear
from mtj_loader.models.layers.positions import Positions, Rotation
from mtj_loader.models.parameter_table import ParameterBuilder

QKV = tuple[jax.Array, jax.Array, jax.Array]


class _AttentionBase:
    """What separate and fused projections of queries, keys and values share.

    Args:
      params: where parameters are declared.
      out_bias: whether the output projection has a bias.
      scale: of the scores; 1/√k if None.
      cap: the soft bound of the scaled scores; None for no bound.
      window: how many positions back a query sees, its own included; None for all.
      rotate: applies a rotary embedding, such as `rotate_halves`; None without one.
      rope: the index of the rotary embedding among those of the model.
      q_norm, k_norm: create norms of queries and keys, [b, t, h, k], under the name they are
        given; None without.
      score_bias: what is added to the scores; None for nothing.
    """

    def __init__(
        self,
        params: ParameterBuilder,
        *,
        out_bias: bool,
        scale: float | None = None,
        cap: float | None = None,
        window: int | None = None,
        rotate: Callable[[jax.Array, Rotation], jax.Array] | None = None,
        rope: int = 0,
        q_norm: Callable[..., Callable[[jax.Array], jax.Array]] | None = None,
        k_norm: Callable[..., Callable[[jax.Array], jax.Array]] | None = None,
        score_bias: ScoreBias | None = None,
    ) -> None:
        self._head_dim, self._window = params.sizes["k"], window
        self._rotate, self._rope = rotate, rope
        self._scale = self._head_dim**-0.5 if scale is None else scale
        self._cap, self._score_bias = cap, score_bias
        self._q_norm = None if q_norm is None else q_norm(name="q_norm")
        self._k_norm = None if k_norm is None else k_norm(name="k_norm")
        self._out = Linear(params, "(h k)", "d", split="h", bias=out_bias, name="linear_3")

    def __call__(
        self, x: jax.Array, positions: Positions, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache]:  # [b, t, d] -> float32 [b, t, d]
        """This shard's term of the output, and the cache with this pass's keys and values."""
        q, k, v = self.project(x)
        q = q if self._q_norm is None else self._q_norm(q)
        k = k if self._k_norm is None else self._k_norm(k)
        if self._rotate is not None:
            rotation = positions.rotations[self._rope]
            q, k = self._rotate(q, rotation), self._rotate(k, rotation)
        q, k, v = (y.astype(x.dtype) for y in (q, k, v))
        cache = update_cache(cache, (k, v), positions)
        heads = attend(
            q,
            cache,
            positions,
            self._scale,
            cap=self._cap,
            window=self._window,
            bias=self._score_bias,
        )
        return self._out(heads.reshape(*x.shape[:2], -1)), cache

    def project(self, x: jax.Array) -> QKV:  # [b, t, d] -> float32 [b, t, h, k] each
        """Queries, keys and values."""
        raise NotImplementedError


class Attention(_AttentionBase):
    """Attention with a linear layer each for queries, values and keys, in MTJ's order.

    Args:
      params: where parameters are declared.
      bias: whether these three have biases.
      kv_heads: the axis of key-value heads: "h", or "g" for grouped queries.
      **options: of `_AttentionBase`.
    """

    def __init__(
        self,
        params: ParameterBuilder,
        *,
        bias: bool,
        kv_heads: str = "h",
        **options: Any,  # noqa: ANN401
    ) -> None:
        def linear(heads: str, name: str) -> Linear:
            return Linear(params, "d", f"({heads} k)", split=heads, bias=bias, name=name)

        # Haiku numbers modules of one base name in the order of creation, so "linear" is first.
        self._q = linear("h", "linear")
        self._v = linear(kv_heads, "linear_1")
        self._k = linear(kv_heads, "linear_2")
        super().__init__(params, **options)

    def project(self, x: jax.Array) -> QKV:  # [b, t, d] -> float32 [b, t, h, k] each
        """Queries, keys and values."""
        q, k, v = (
            linear(x).reshape(*x.shape[:2], -1, self._head_dim)
            for linear in (self._q, self._k, self._v)
        )
        return q, k, v


class FusedAttention(_AttentionBase):
    """Attention with one linear layer, in whose outputs each head is q, k and v in turn.

    Args:
      params: where parameters are declared.
      bias: whether this layer and the output projection have biases.
      clip: queries, keys and values are clamped to ± this; None for no bound.
      **options: of `_AttentionBase`.
    """

    def __init__(
        self,
        params: ParameterBuilder,
        *,
        bias: bool,
        clip: float | None = None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(params, out_bias=bias, **options)
        self._clip = clip
        self._qkv = Linear(params, "d", "(h 3 k)", split="h", bias=bias, name="combined_qkv")

    def project(self, x: jax.Array) -> QKV:  # [b, t, d] -> float32 [b, t, h, k] each
        """Queries, keys and values."""
        qkv = self._qkv(x)
        qkv = qkv if self._clip is None else jnp.clip(qkv, -self._clip, self._clip)
        qkv = qkv.reshape(*x.shape[:2], -1, 3, self._head_dim)
        return qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]
