"""Mistral 7B (Jiang et al., 2023, arXiv:2310.06825): Llama with a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mtj_loader.models.llama_like import LlamaLikeConfig, make_llama_like


@dataclass(frozen=True, kw_only=True)
class Config(LlamaLikeConfig):
    """The settings of Mistral."""

    model_type = "mistral"
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


make_model = make_llama_like
