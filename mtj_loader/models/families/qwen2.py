"""Qwen2 and Qwen2.5 (Yang et al., 2024, arXiv:2407.10671): biased queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mtj_loader.models.config import ConfigReader
from mtj_loader.models.decoder import CausalTransformer
from mtj_loader.models.llama_like import (
    LlamaLikeConfig,
    Windows,
    make_llama_like,
    windows_by_layer,
)
from mtj_loader.models.parameter_table import ParameterBuilder


@dataclass(frozen=True, kw_only=True)
class Config(LlamaLikeConfig):
    """The settings of Qwen2."""

    model_type = "qwen2"
    defaults: ClassVar = {  # of transformers' Qwen2Config
        "head_dim": None,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "norm_eps": 1e-6,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }

    @classmethod
    def read_windows(cls, reader: ConfigReader, layers: int) -> Windows:
        """Reads the windows; without `layer_types`, layers from `max_window_layers` have one."""
        first = reader.integer("max_window_layers", low=0)
        window = cls.read_window(reader)
        window = window if reader.flag("use_sliding_window") else None
        return windows_by_layer(
            reader, layers, window, lambda layer: window is not None and layer >= first
        )


def make_model(config: Config, params: ParameterBuilder) -> CausalTransformer:
    """Qwen2."""
    return make_llama_like(config, params, attention={"bias": True, "out_bias": False})
