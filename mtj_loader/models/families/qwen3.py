"""Dense Qwen3 (Yang et al., 2025, arXiv:2505.09388): Llama with normed queries and keys."""

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
    """What Qwen3 adds.

    Attributes:
      attention_bias: whether the four linear layers of the attention have biases.
    """

    model_type = "qwen3"
    spellings: ClassVar = {"norm_eps": ("rms_norm_eps",)}
    defaults: ClassVar = {  # of transformers' Qwen3Config
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "norm_eps": 1e-6,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    }
    rotary: ClassVar = {"fraction": 1.0, "whole_heads": True}
    # These only matter if use_sliding_window is true, which no published model sets.
    ignored_keys = ("max_window_layers", "sliding_window")

    attention_bias: bool

    @classmethod
    def read_own(cls, reader: ConfigReader, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the attribute above."""
        return {"attention_bias": reader.flag("attention_bias")}

    def supported_values(self) -> Mapping[str, object]:
        """No layer has a sliding window."""
        return {"use_sliding_window": False, "layer_types": ["full_attention"] * self.layers}


def make_model(config: Config, params: ParameterBuilder) -> CausalTransformer:
    """Qwen3."""
    norm = partial(RMSNorm, params, config.norm_eps)

    def attention(index: int) -> Attention:
        return Attention(
            params,
            head_dim=config.head_dim,
            bias=config.attention_bias,
            out_bias=config.attention_bias,
            kv_heads="g",
            q_norm=norm(axis="k", name="q_norm"),
            k_norm=norm(axis="k", name="k_norm"),
            rotate=rotate_halves,
        )

    def feed_forward(index: int) -> GatedMLP:
        return GatedMLP(params, config.activation)

    layer = partial(Layer, norm=norm, attention=attention, feed_forward=feed_forward)
    return CausalTransformer(config, params, norm=norm, layer=layer)
