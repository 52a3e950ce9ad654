"""Causal attention with a cache.

A layer creates an attention in its `__init__`: its linear layers then have the layer's path.

  b batch   t time (queries)   T time (keys)   d model   h heads and g KV heads of one shard
  k head_dim
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtj_loader.models.layers.linears import Linear, soft_cap
from mtj_loader.models.layers.positions import Positions, Rotation
from mtj_loader.models.parameter_table import ParameterBuilder

# One layer's keys and values, [b, T, g, k] each.
KVCache = tuple[jax.Array, jax.Array]
QKV = tuple[jax.Array, jax.Array, jax.Array]


def update_cache(cache: KVCache | None, new: KVCache, positions: jax.Array) -> KVCache:
    """The keys and values to attend to: the new ones, or the cache with the new ones in it.

    Args:
      cache: [b, T, g, k] each; None in a pass over whole rows.
      new: those of this pass, [b, t, g, k] each.
      positions: int32 [b, t], where to write; positions outside the cache are dropped.
    """
    if cache is None:
        return new
    rows = jnp.arange(positions.shape[0])[:, None]
    keys, values = (
        old.at[rows, positions].set(fresh, mode="drop")
        for old, fresh in zip(cache, new, strict=True)
    )
    return keys, values


def attend(
    q: jax.Array,  # [b, t, h, k]
    cache: KVCache,  # [b, T, g, k] each
    visible: jax.Array,  # bool [b, t, T]
    scale: float,
    *,
    cap: float | None = None,
    bias: jax.Array | None = None,  # float32 [b or 1, h, t, T]
) -> jax.Array:  # [b, t, h, k]
    """Softmax attention; scores are scaled, bounded by `cap` if there is one, and `bias` is added.

    Scores and softmax are in float32.

    With g < h, every h/g neighboring heads attend to the same keys and values (grouped queries,
    Ainslie et al., 2023, arXiv:2305.13245).
    """
    keys, values = cache
    scores = soft_cap(_scores(q, keys) * scale, cap)
    scores = scores if bias is None else scores + bias
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)  # every query sees at least itself
    return _weighted_values(weights.astype(values.dtype), values).astype(values.dtype)


def _scores(q: jax.Array, keys: jax.Array) -> jax.Array:
    """[b, t, h, k] and [b, T, g, k] -> float32 [b, h, t, T]."""
    b, t, h, k = q.shape
    grouped = q.reshape(b, t, keys.shape[2], -1, k)  # [b, t, g, h/g, k]
    return _product("btgrk,bTgk->bgrtT", grouped, keys).reshape(b, h, t, -1)


def _weighted_values(weights: jax.Array, values: jax.Array) -> jax.Array:
    """[b, h, t, T] and [b, T, g, k] -> float32 [b, t, h, k]."""
    b, h, t, keys = weights.shape
    grouped = weights.reshape(b, values.shape[2], -1, t, keys)  # [b, g, h/g, t, T]
    return _product("bgrtT,bTgk->btgrk", grouped, values).reshape(b, t, h, -1)


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:  # float32
    return jnp.einsum(
        equation,
        x,
        y,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


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
      score_bias: what is added to the scores, float32 [b or 1, h, t, T]; None for nothing.
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
        score_bias: Callable[[Positions], jax.Array] | None = None,
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
        """This shard's term of the output, and the keys and values it attended to."""
        q, k, v = self.project(x)
        q = q if self._q_norm is None else self._q_norm(q)
        k = k if self._k_norm is None else self._k_norm(k)
        if self._rotate is not None:
            rotation = positions.rotations[self._rope]
            q, k = self._rotate(q, rotation), self._rotate(k, rotation)
        q, k, v = (y.astype(x.dtype) for y in (q, k, v))
        cache = update_cache(cache, (k, v), positions.queries)
        bias = None if self._score_bias is None else self._score_bias(positions)
        visible = positions.visible(self._window)
        heads = attend(q, cache, visible, self._scale, cap=self._cap, bias=bias)
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
