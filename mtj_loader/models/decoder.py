"""The decoder of every family: embedding, layers, projection.

Families choose and configure the parts; most only differ in the norm, attention and feed-forward
that they pass to `CausalTransformer`.

  b batch   t time   d model   V padded vocabulary   n shards   h heads of one shard   k head_dim
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import haiku as hk
import jax

from mtj_loader.models.config import ModelConfig
from mtj_loader.models.layers.attend import KVCache
from mtj_loader.models.layers.embeddings import Embedding, Projection
from mtj_loader.models.layers.linears import add_residual, sum_over_shards
from mtj_loader.models.layers.positions import Positions
from mtj_loader.models.parameter_table import ParameterBuilder

NAME = "causal_transformer_shard"  # the root of MTJ's module paths

Norm = Callable[[jax.Array], jax.Array]  # [..., d] -> [..., d]
FeedForward = Callable[[jax.Array], jax.Array]  # [b, t, d] -> float32 [b, t, d], a shard's term


class SelfAttention(Protocol):
    """The attention of one layer."""

    def __call__(
        self, x: jax.Array, positions: Positions, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache]:  # [b, t, d] -> float32 [b, t, d]
        """This shard's term of the output, and the cache with this pass's keys and values."""
        ...


class Layer(hk.Module):
    """x + attention(norm(x)), then the same with the feed-forward.

    The parts are created in `__init__`, so that their modules have the layer's path.

    Args:
      norm: creates a norm under the name it is given.
      attention, feed_forward: create these parts.
      shared_norm: attention and feed-forward have the same norm.
      name: of the module.
    """

    def __init__(
        self,
        *,
        norm: Callable[..., Norm],
        attention: Callable[[], SelfAttention],
        feed_forward: Callable[[], FeedForward],
        shared_norm: bool = False,
        name: str,
    ) -> None:
        super().__init__(name=name)
        self.attention_norm = norm(name="replicated_layer_norm")
        self.feed_forward_norm = self.attention_norm
        if not shared_norm:
            self.feed_forward_norm = norm(name="replicated_layer_norm_1")
        self.attention = attention()
        self.feed_forward = feed_forward()

    def __call__(
        self, x: jax.Array, positions: Positions, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache]:  # [b, t, d] -> [b, t, d]
        """The residual stream after this layer, and the cache with this pass's keys and values."""
        attention, cache = self.attention(self.attention_norm(x), positions, cache)
        x = add_residual(x, sum_over_shards(attention))
        change = sum_over_shards(self.feed_forward(self.feed_forward_norm(x)))
        return add_residual(x, change), cache


class ParallelLayer(Layer):
    """x + attention(norm(x)) + feed_forward(norm(x)): both read the layer's input."""

    def __call__(
        self, x: jax.Array, positions: Positions, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache]:  # [b, t, d] -> [b, t, d]
        """The residual stream after this layer, and the cache with this pass's keys and values."""
        normed = self.attention_norm(x)
        attention, cache = self.attention(normed, positions, cache)
        if self.feed_forward_norm is not self.attention_norm:
            normed = self.feed_forward_norm(x)
        change = attention + self.feed_forward(normed)
        return add_residual(x, sum_over_shards(change)), cache


class NormedResidualLayer(Layer):
    """A layer whose residual sums start from the normed stream."""

    def __call__(
        self, x: jax.Array, positions: Positions, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache]:  # [b, t, d] -> [b, t, d]
        """The residual stream after this layer, and the cache with this pass's keys and values."""
        x = self.attention_norm(x)
        attention, cache = self.attention(x, positions, cache)
        x = self.feed_forward_norm(add_residual(x, sum_over_shards(attention)))
        return add_residual(x, sum_over_shards(self.feed_forward(x))), cache


class PostNormLayer(Layer):
    """A layer whose norms follow the residual sums."""

    def __call__(
        self, x: jax.Array, positions: Positions, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache]:  # [b, t, d] -> [b, t, d]
        """The residual stream after this layer, and the cache with this pass's keys and values."""
        attention, cache = self.attention(x, positions, cache)
        x = self.attention_norm(add_residual(x, sum_over_shards(attention)))
        change = sum_over_shards(self.feed_forward(x))
        return self.feed_forward_norm(add_residual(x, change)), cache


class SandwichLayer(Layer):
    """A layer with norms before and after attention and feed-forward, inside the residual sums.

    From CogView (Ding et al., 2021, arXiv:2105.13290); Gemma 2 has it.
    """

    def __init__(self, *, norm: Callable[..., Norm], name: str, **parts: Any) -> None:  # noqa: ANN401
        super().__init__(norm=norm, name=name, **parts)
        self.attention_out_norm = norm(name="replicated_layer_norm_2")
        self.feed_forward_out_norm = norm(name="replicated_layer_norm_3")

    def __call__(
        self, x: jax.Array, positions: Positions, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache]:  # [b, t, d] -> [b, t, d]
        """The residual stream after this layer, and the cache with this pass's keys and values."""
        attention, cache = self.attention(self.attention_norm(x), positions, cache)
        x = add_residual(x, self.attention_out_norm(sum_over_shards(attention)))
        change = sum_over_shards(self.feed_forward(self.feed_forward_norm(x)))
        return add_residual(x, self.feed_forward_out_norm(change)), cache


class CausalTransformer(hk.Module):
    """A model of any family.

    Args:
      config: of the family.
      params: where parameters are declared.
      norm: creates a norm under the name it is given.
      attention: creates the attention of the layer with the given index, from 0.
      feed_forward: creates the feed-forward of a layer.
      layer: creates a layer of these parts.
      final_norm: whether there is a norm after the last layer.
      embedding: creates the embedding.
      projection: creates the projection.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: ParameterBuilder,
        *,
        norm: Callable[..., Norm],
        attention: Callable[[int], SelfAttention],
        feed_forward: Callable[[], FeedForward],
        layer: Callable[..., Layer] = Layer,
        final_norm: bool = True,
        embedding: Callable[..., Embedding] = Embedding,
        projection: Callable[..., Projection] = Projection,
    ) -> None:
        super().__init__(name=NAME)
        self.ropes = config.ropes
        self.embedding = embedding(params, name="embedding_shard")
        make_layer = partial(layer, norm=norm, feed_forward=feed_forward)
        self.layers = [
            make_layer(attention=partial(attention, i), name=f"layer_{i}")
            for i in range(config.layers)
        ]
        self.projection = projection(
            params,
            norm=norm if final_norm else None,
            tied_to=self.embedding if config.tie_word_embeddings else None,
            name="projection_shard",
        )

    def __call__(
        self, ids: jax.Array, positions: Positions, caches: Sequence[KVCache] | None
    ) -> tuple[jax.Array, list[KVCache]]:  # int32 [b, t] -> [b, t, d]
        """The residual stream after the last layer, and every layer's cache."""
        x = self.embedding(ids, positions)
        updated_caches = []
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x, updated = layer(x, positions, cache)
            updated_caches.append(updated)
        return x, updated_caches
