"""Llama (Touvron et al., 2023, arXiv:2302.13971; Llama 2 and 3), and models of its layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mtj_loader.models.llama_like import LlamaLikeConfig, make_llama_like


@dataclass(frozen=True, kw_only=True)
class Config(LlamaLikeConfig):
    """The settings of Llama."""

    model_type = "llama"
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


make_model = make_llama_like
