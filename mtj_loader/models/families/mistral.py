"""Mistral 7B (Jiang et al., 2023, arXiv:2310.06825): Llama with a sliding window."""

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
    """What Mistral adds.

    Attributes:
      sliding_window: how many positions back a token sees, its own included; None for all.
    """

    model_type = "mistral"
    spellings: ClassVar = {"norm_eps": ("rms_norm_eps",)}
    defaults: ClassVar = {  # of transformers' MistralConfig
        "head_dim": None,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "norm_eps": 1e-6,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }
    rotary: ClassVar = {"fraction": 1.0, "whole_heads": True}

    sliding_window: int | None

    @classmethod
    def read_own(cls, reader: ConfigReader, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the attribute above."""
        windowed = reader.has("sliding_window")
        return {"sliding_window": reader.integer("sliding_window") if windowed else None}


def make_model(config: Config, params: ParameterBuilder) -> CausalTransformer:
    """Mistral."""
    norm = partial(RMSNorm, params, config.norm_eps)

    def attention(index: int) -> Attention:
        return Attention(
            params,
            head_dim=config.head_dim,
            bias=False,
            out_bias=False,
            kv_heads="g",
            window=config.sliding_window,
            rotate=rotate_halves,
        )

    def feed_forward(index: int) -> GatedMLP:
        return GatedMLP(params, config.activation)

    layer = partial(Layer, norm=norm, attention=attention, feed_forward=feed_forward)
    return CausalTransformer(config, params, norm=norm, layer=layer)
