"""GPT-J (Wang and Komatsuzaki, 2021): one norm per layer, attention and MLP in parallel.

b batch   t time   d model
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp

from mtj_loader.models.config import ConfigReader, ModelConfig
from mtj_loader.models.decoder import CausalTransformer, ParallelLayer
from mtj_loader.models.layers import embeddings
from mtj_loader.models.layers.attention import Attention
from mtj_loader.models.layers.embeddings import Projection
from mtj_loader.models.layers.feed_forward import MLP
from mtj_loader.models.layers.linears import add_residual, sum_over_shards
from mtj_loader.models.layers.norms import LayerNorm
from mtj_loader.models.layers.positions import rotate_pairs
from mtj_loader.models.layers.rope import DEFAULT_THETA, Rope
from mtj_loader.models.parameter_table import ParameterBuilder


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """GPT-J adds no attributes to those of all families."""

    model_type = "gptj"
    spellings: ClassVar = {
        "hidden_act": ("activation_function",),
        "hidden_size": ("n_embd", "hidden_size"),
        "intermediate_size": ("n_inner",),
        "max_position_embeddings": ("n_positions", "max_position_embeddings"),
        "norm_eps": ("layer_norm_epsilon",),
        "num_attention_heads": ("n_head", "num_attention_heads"),
        "num_hidden_layers": ("n_layer", "num_hidden_layers"),
    }
    defaults: ClassVar = {  # of transformers' GPTJConfig
        "hidden_act": "gelu_new",
        "hidden_size": 4096,
        "intermediate_size": None,
        "max_position_embeddings": 2048,
        "norm_eps": 1e-5,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "rotary_dim": 64,
        "tie_word_embeddings": False,
        "vocab_size": 50400,
    }

    @classmethod
    def read_rope(cls, reader: ConfigReader, *, head_dim: int, max_positions: int) -> Rope:
        """Plain rotary embedding of `rotary_dim` dimensions, as if they were the whole head."""
        dims = reader.integer("rotary_dim", high=head_dim)
        if dims % 2:
            what = "rotary embedding rotates pairs of dimensions"
            reader.refuse(what, "rotary_dim", "an even number")
        return Rope(
            theta=DEFAULT_THETA, head_dim=dims, fraction=1.0, trained_positions=max_positions
        )

    def supported_values(self) -> Mapping[str, object]:
        """Switches that neither MTJ nor transformers implements for this family."""
        return {"rotary": True, "scale_attn_weights": True}


class Embedding(embeddings.Embedding):
    """Token embedding with MTJ's bias: every shard adds its own."""

    def __init__(self, params: ParameterBuilder, name: str) -> None:
        super().__init__(params, name)
        self.table.declare("b", "d")

    def tokens(self, ids: jax.Array) -> jax.Array:  # int32 [b, t] -> [b, t, d]
        """The rows of these tokens plus the bias."""
        bias = sum_over_shards(self.table.parameter("b").astype(jnp.float32))
        return add_residual(super().tokens(ids), bias)


def make_model(config: Config, params: ParameterBuilder) -> CausalTransformer:
    """GPT-J."""
    return CausalTransformer(
        config,
        params,
        norm=partial(LayerNorm, params, config.norm_eps),
        attention=lambda layer: Attention(params, bias=False, out_bias=False, rotate=rotate_pairs),
        feed_forward=partial(MLP, params, config.activation),
        layer=partial(ParallelLayer, shared_norm=True),
        embedding=Embedding,
        projection=partial(Projection, bias=True),
    )
