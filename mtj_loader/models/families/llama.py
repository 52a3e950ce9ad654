"""Llama (Touvron et al., 2023, arXiv:2302.13971; Llama 2 and 3), and models of its layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from mtj_loader.models.config import ConfigReader, ModelConfig
from mtj_loader.models.decoder import CausalTransformer, Layer
from mtj_loader.models.layers.attention import Attention
from mtj_loader.models.layers.feed_forward import GatedMLP
from mtj_loader.models.layers.norms import RMSNorm
from mtj_loader.models.layers.positions import rotate_halves
from mtj_loader.models.parameter_table import ParameterBuilder


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """What Llama adds.

    Attributes:
      attention_bias: whether the four linear layers of the attention have biases.
      mlp_bias: whether the three of the MLP have.
    """

    model_type = "llama"
    spellings: ClassVar = {"norm_eps": ("rms_norm_eps",)}
    defaults: ClassVar = {  # of transformers' LlamaConfig
        "attention_bias": False,
        "head_dim": None,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "norm_eps": 1e-6,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }
    rotary: ClassVar = {"fraction": 1.0, "whole_heads": True}

    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def read_own(cls, reader: ConfigReader, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the attributes above."""
        names = ("attention_bias", "mlp_bias")
        return {name: reader.flag(name) for name in names}


def make_model(config: Config, params: ParameterBuilder) -> CausalTransformer:
    """Llama."""
    norm = partial(RMSNorm, params, config.norm_eps)

    def attention(index: int) -> Attention:
        return Attention(
            params,
            head_dim=config.head_dim,
            bias=config.attention_bias,
            out_bias=config.attention_bias,
            kv_heads="g",
            rotate=rotate_halves,
        )

    def feed_forward(index: int) -> GatedMLP:
        return GatedMLP(params, config.activation, bias=config.mlp_bias)

    layer = partial(Layer, norm=norm, attention=attention, feed_forward=feed_forward)
    return CausalTransformer(config, params, norm=norm, layer=layer)
