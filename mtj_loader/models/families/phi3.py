"""Phi-3 (Abdin et al., 2024, arXiv:2404.14219), Phi-3.5 and Phi-4: Llama with fused linear layers.

The map splits the fused tensors, so the parameters are Llama's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mtj_loader.models.config import ConfigReader
from mtj_loader.models.layers.rope import LongRope, Rope
from mtj_loader.models.llama_like import LlamaLikeConfig, make_llama_like


@dataclass(frozen=True, kw_only=True)
class Config(LlamaLikeConfig):
    """The settings of Phi-3."""

    model_type = "phi3"
    defaults: ClassVar = {  # of transformers' Phi3Config
        "head_dim": None,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": None,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32064,
    }
    rotary: ClassVar = {
        "fraction": 1.0,
        "types": {  # with the names that the first files have
            "default": "default",
            "longrope": "longrope",
            "su": "longrope",
            "yarn": "longrope",
        },
    }

    @classmethod
    def read_rope(cls, reader: ConfigReader, *, head_dim: int, max_positions: int) -> Rope | None:
        """Reads the rotary embedding; LongRope needs the length before stretching.

        At the top level: transformers overrides the one in the section, if need be by a default.
        """
        rope = super().read_rope(reader, head_dim=head_dim, max_positions=max_positions)
        if isinstance(rope, LongRope):
            reader.integer("original_max_position_embeddings")
        return rope


make_model = make_llama_like
