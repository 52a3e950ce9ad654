"""Attention and MLP as most of MTJ's families have them: declarations, and what they compute.

A layer makes them in its `__init__`: their linear layers then carry the layer's path.

  b batch   t time   T time (keys)   d model   f feed-forward   h heads and g KV heads of one
shard   k head_dim
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from mtj_loader.models.layers.activations import ACTIVATIONS
from mtj_loader.models.layers.attention import KVCache, Span, attend, rotate_halves, update_cache
from mtj_loader.models.layers.parts import Linear
from mtj_loader.models.parameter_table import Declaration, Declared
from mtj_loader.parameters import ParamSpec


def attention_parameters(
    declare: Declaration, layer: str, *, bias: bool, out_bias: bool, kv: str = "h"
) -> list[ParamSpec]:
    """The parameters of `Attention`; keys and values have the heads of the axis `kv`."""
    return [
        *declare.linear(layer + "linear", "d", "(h k)", split="h", bias=bias),
        *declare.linear(layer + "linear_1", "d", f"({kv} k)", split=kv, bias=bias),
        *declare.linear(layer + "linear_2", "d", f"({kv} k)", split=kv, bias=bias),
        *declare.linear(layer + "linear_3", "(h k)", "d", split="h", bias=out_bias),
    ]


def mlp_parameters(declare: Declaration, layer: str, *, bias: bool) -> list[ParamSpec]:
    """The parameters of `MLP`."""
    return [
        *declare.linear(layer + "linear_4", "d", "f", split="f", bias=bias),
        *declare.linear(layer + "linear_5", "f", "d", split="f", bias=bias),
    ]


def gated_mlp_parameters(declare: Declaration, layer: str, *, bias: bool) -> list[ParamSpec]:
    """The parameters of `GatedMLP`."""
    up = declare.linear(layer + "linear_6", "d", "f", split="f", bias=bias)
    return [*mlp_parameters(declare, layer, bias=bias), *up]


def unturned(x: jax.Array, span: Span) -> jax.Array:
    """Queries or keys as they are, for families whose positions enter elsewhere."""
    return x


def turn_halves(x: jax.Array, span: Span) -> jax.Array:  # float32 [b, t, h, k]
    """Rotary embedding of the dimensions i and i + r/2."""
    assert span.rotation is not None  # for families with a rope
    return rotate_halves(x, span.rotation)


def unnormed(x: jax.Array) -> jax.Array:
    """Queries or keys as they are, for families that do not norm them."""
    return x


class Attention:
    """Attention whose queries, values and keys have a linear layer each, in MTJ's order.

    Args:
      head_dim: k.
      scale: of the scores.
      window: how many positions back a query sees, its own included; None for all.
      turn: puts positions into queries and keys, float32 [b, t, h, k].
      q_norm, k_norm: norm each head's queries and keys, [b, t, h, k].
    """

    def __init__(
        self,
        declared: Declared,
        *,
        head_dim: int,
        scale: float,
        window: int | None = None,
        turn: Callable[[jax.Array, Span], jax.Array] = unturned,
        q_norm: Callable[[jax.Array], jax.Array] = unnormed,
        k_norm: Callable[[jax.Array], jax.Array] = unnormed,
    ) -> None:
        self._head_dim, self._scale, self._window = head_dim, scale, window
        self._turn, self._q_norm, self._k_norm = turn, q_norm, k_norm
        self._q = Linear(declared, name="linear")
        self._v = Linear(declared, name="linear_1")
        self._k = Linear(declared, name="linear_2")
        self._out = Linear(declared, name="linear_3")

    def __call__(
        self, x: jax.Array, span: Span, memory: KVCache | None
    ) -> tuple[jax.Array, KVCache]:  # [b, t, d] -> float32 [b, t, d]
        """This shard's term of the output, and the keys and values it attended to."""
        q, k, v = (self._heads(linear(x)) for linear in (self._q, self._k, self._v))
        q, k = self._turn(self._q_norm(q), span), self._turn(self._k_norm(k), span)
        q, k, v = (y.astype(x.dtype) for y in (q, k, v))
        memory = update_cache(memory, (k, v), span.positions)
        visible = span.visible if self._window is None else span.within(self._window)
        heads = attend(q, memory, visible, self._scale)
        return self._out(heads.reshape(*x.shape[:2], -1)), memory

    def _heads(self, x: jax.Array) -> jax.Array:  # [b, t, h·k] -> [b, t, h, k]
        return x.reshape(*x.shape[:2], -1, self._head_dim)


class MLP:
    """Two linear layers with an activation between."""

    def __init__(self, declared: Declared, activation: str) -> None:
        self._activation = ACTIVATIONS[activation]
        self._up = Linear(declared, name="linear_4")
        self._down = Linear(declared, name="linear_5")

    def __call__(self, x: jax.Array) -> jax.Array:  # [b, t, d] -> float32 [b, t, d]
        """This shard's term of the MLP's output."""
        return self._down(self._activation(self._up(x)).astype(x.dtype))


class GatedMLP:
    """The down projection of activation(gate) · up (Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, declared: Declared, activation: str) -> None:
        self._activation = ACTIVATIONS[activation]
        self._gate = Linear(declared, name="linear_4")
        self._down = Linear(declared, name="linear_5")
        self._up = Linear(declared, name="linear_6")

    def __call__(self, x: jax.Array) -> jax.Array:  # [b, t, d] -> float32 [b, t, d]
        """This shard's term of the MLP's output."""
        hidden = self._activation(self._gate(x)) * self._up(x)
        return self._down(hidden.astype(x.dtype))


def split_qkv(qkv: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of a fused layer, in which each head is q, k and v in turn.

    Args:
      qkv: [b, t, h·3·k].
      head_dim: k.

    Returns:
      [b, t, h, k] each.
    """
    parts = qkv.reshape(*qkv.shape[:2], -1, 3, head_dim)
    return parts[..., 0, :], parts[..., 1, :], parts[..., 2, :]
