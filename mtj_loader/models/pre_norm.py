"""The decoder of Llama and its kin: attention and feed-forward each behind a norm, one by one.

Families differ in the norm, the attention and the feed-forward that they put in, and in the
settings they have; what all of them read, declare and compute is here.

b batch   t time   T time (keys)   d model   V padded vocabulary   n shards
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import haiku as hk
import jax

from mtj_loader.formats.hf_config import Reader
from mtj_loader.models.config import (
    MAX_LAYERS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    ModelConfig,
    head_dim,
)
from mtj_loader.models.decoder import NAME, CausalTransformer
from mtj_loader.models.layers import rope
from mtj_loader.models.layers.activations import ACTIVATIONS
from mtj_loader.models.layers.attention import KVCache, Span
from mtj_loader.models.layers.blocks import Attention, turn_halves
from mtj_loader.models.layers.parts import Embedding, Projection, add_residual, sum_over_shards
from mtj_loader.models.layers.rope import DEFAULT_THETA, Proportional, Rope
from mtj_loader.models.parameter_table import Declaration, Declared
from mtj_loader.parameters import ParamSpec

Norm = Callable[[jax.Array], jax.Array]  # [..., d] -> [..., d]
FeedForward = Callable[[jax.Array], jax.Array]  # [b, t, d] -> float32 [b, t, d], a shard's term


class SelfAttention(Protocol):
    """The attention of one layer."""

    def __call__(
        self, x: jax.Array, span: Span, memory: KVCache | None
    ) -> tuple[jax.Array, KVCache]:  # [b, t, d] -> float32 [b, t, d]
        """This shard's term of the output, and the keys and values it attended to."""
        ...


def settings(config: Reader, model_type: str, *, theta: float = DEFAULT_THETA) -> dict[str, Any]:
    """The attributes of `ModelConfig`, from the names that Llama gave the settings.

    Args:
      config: the family's reader, in which no setting is absent; those that may be null are
        num_key_value_heads (as many as heads) and head_dim (the width by the heads).
      model_type: the family.
      theta: the base of rotary wavelengths where the config does not say.

    Raises:
      ConfigError: a setting that is malformed or contradictory.
    """
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        what = "query heads cannot share key-value heads evenly"
        raise config.error(what, "num_key_value_heads", f"a divisor of {heads}")
    size = config.integer("head_dim", high=MAX_WIDTH) if config.has("head_dim") else None
    size = size or head_dim(config, "hidden_size", "num_attention_heads")
    width = config.integer("hidden_size", high=MAX_WIDTH)
    positions = config.integer("max_position_embeddings")
    return {
        "model_type": model_type,
        "d_model": width,
        "layers": config.integer("num_hidden_layers", high=MAX_LAYERS),
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "head_dim": size,
        "d_embed": width,
        "d_ff": config.integer("intermediate_size", high=MAX_WIDTH),
        "vocab_size": config.integer("vocab_size", high=MAX_VOCABULARY),
        "max_positions": positions,
        "norm_eps": config.number("rms_norm_eps"),
        "activation": config.choice("hidden_act", ACTIVATIONS),
        "tie_word_embeddings": config.flag("tie_word_embeddings"),
        "rope": _whole_head_rope(config, size, positions, theta),
    }


def _whole_head_rope(config: Reader, size: int, positions: int, theta: float) -> Rope:
    """The rotary embedding; these families rotate whole heads and ignore any other share."""
    found = rope.read(config, head_dim=size, max_positions=positions, fraction=1.0, theta=theta)
    if found.fraction != 1 and not isinstance(found, Proportional):
        what = "this family rotates whole heads"
        raise config.error(what, "partial_rotary_factor", "1")
    return found


def parameters(
    config: ModelConfig,
    declare: Declaration,
    layer: Callable[[str], list[ParamSpec]],
    norm: Callable[[str], list[ParamSpec]],
) -> list[ParamSpec]:
    """Every parameter of a model.

    Args:
      config: of any family.
      declare: with the sizes of all axes.
      layer: the attention's and feed-forward's parameters, from the layer's path.
      norm: a norm's parameters, from its path.
    """
    specs = [declare.parameter("embedding_shard/~/linear", "w", "V d", "V")]
    for i in range(config.layers):
        path = f"layer_{i}/~/"
        specs += norm(path + "replicated_layer_norm")
        specs += norm(path + "replicated_layer_norm_1")
        specs += layer(path)
    specs += norm("projection_shard/~/replicated_layer_norm")
    if not config.tie_word_embeddings:
        specs += declare.linear("projection_shard/~/linear", "d", "V", split="V", bias=False)
    return specs


class RotaryAttention(Attention):
    """Grouped-query attention with rotary embedding.

    Args:
      config: of the family.
      window: how many positions back a query sees, its own included; None for all.
      **norms: `q_norm` and `k_norm` of `Attention`.
    """

    def __init__(
        self, declared: Declared, config: ModelConfig, *, window: int | None = None, **norms: Norm
    ) -> None:
        size = config.head_dim
        super().__init__(
            declared, head_dim=size, scale=size**-0.5, window=window, turn=turn_halves, **norms
        )


class Layer(hk.Module):
    """x + attention(norm(x)), and then the same with the feed-forward.

    Args:
      norm: creates a norm under the name it is given.
      attention, feed_forward: create the layer's parts.
    """

    def __init__(
        self,
        *,
        norm: Callable[..., Norm],
        attention: Callable[[], SelfAttention],
        feed_forward: Callable[[], FeedForward],
        name: str,
    ) -> None:
        super().__init__(name=name)
        self.attention_norm = norm(name="replicated_layer_norm")
        self.feed_forward_norm = norm(name="replicated_layer_norm_1")
        self.attention = attention()
        self.feed_forward = feed_forward()

    def __call__(
        self, x: jax.Array, span: Span, memory: KVCache | None
    ) -> tuple[jax.Array, KVCache]:  # [b, t, d] -> [b, t, d]
        """The residual stream after this layer, and the keys and values it attended to."""
        attention, memory = self.attention(self.attention_norm(x), span, memory)
        x = add_residual(x, sum_over_shards(attention))
        change = sum_over_shards(self.feed_forward(self.feed_forward_norm(x)))
        return add_residual(x, change), memory


class PreNormTransformer(CausalTransformer):
    """The model, made of a family's norm, attention and feed-forward, which `Layer` describes."""

    def __init__(
        self,
        config: ModelConfig,
        declared: Declared,
        *,
        norm: Callable[..., Norm],
        attention: Callable[[], SelfAttention],
        feed_forward: Callable[[], FeedForward],
        embedding: Callable[..., Embedding] = Embedding,
        projection: Callable[..., Projection] = Projection,
    ) -> None:
        super().__init__(name=NAME)
        self.rope = config.rope
        self.embedding = embedding(declared, name="embedding_shard")
        self.layers = [
            Layer(norm=norm, attention=attention, feed_forward=feed_forward, name=f"layer_{i}")
            for i in range(config.layers)
        ]
        self.projection = projection(
            declared,
            norm=norm,
            tied_to=self.embedding if config.tie_word_embeddings else None,
            name="projection_shard",
        )
