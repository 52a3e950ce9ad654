"""The frame of every decoder: embedding, layers, projection.

b batch   t time   d model   V padded vocabulary   n shards   h heads of one shard   k head_dim
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import haiku as hk
import jax

from mtj_loader.models.layers.attention import KVCache, Span
from mtj_loader.models.layers.rope import Rope

NAME = "causal_transformer_shard"  # the root of MTJ's module paths


class Layer(Protocol):
    """One layer of a family."""

    def __call__(
        self, x: jax.Array, span: Span, memory: KVCache | None
    ) -> tuple[jax.Array, KVCache]:  # [b, t, d] -> [b, t, d]
        """The residual stream after this layer, and the keys and values it attended to."""
        ...


class CausalTransformer(hk.Module):
    """A family's subclass creates the three parts in `__init__`, under MTJ's names."""

    rope: Rope | None
    embedding: Callable[[jax.Array], jax.Array]  # int32 [b, t] -> [b, t, d]
    layers: Sequence[Layer]
    projection: Callable[[jax.Array], jax.Array]  # [..., d] -> float32 [..., V/n]

    def __call__(
        self, ids: jax.Array, span: Span, cache: Sequence[KVCache] | None
    ) -> tuple[jax.Array, list[KVCache]]:  # int32 [b, t] -> [b, t, d]
        """The residual stream after the last layer, and every layer's keys and values."""
        x = self.embed(ids, span)
        memories = []
        for layer, memory in zip(self.layers, cache or [None] * len(self.layers), strict=True):
            x, updated = layer(x, span, memory)
            memories.append(updated)
        return x, memories

    def embed(self, ids: jax.Array, span: Span) -> jax.Array:  # int32 [b, t] -> [b, t, d]
        """What enters the first layer; families whose positions enter here add them."""
        return self.embedding(ids)
