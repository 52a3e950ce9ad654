"""Mistral 7B (Jiang et al., 2023, arXiv:2310.06825): Llama's layers behind a sliding window.

n shards   d model   f feed-forward   V padded vocabulary   h heads   g KV heads   k head_dim
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from mtj_loader.formats.hf_config import Reader
from mtj_loader.models import pre_norm
from mtj_loader.models.config import ModelConfig
from mtj_loader.models.layers.blocks import GatedMLP, attention_parameters, gated_mlp_parameters
from mtj_loader.models.layers.parts import RMSNorm
from mtj_loader.models.parameter_table import Declaration, Declared
from mtj_loader.models.pre_norm import PreNormTransformer, RotaryAttention
from mtj_loader.parameters import ParamSpec

# transformers' MistralConfig
_DEFAULTS: dict[str, object] = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """What Mistral adds.

    Attributes:
      sliding_window: how many positions back a token sees, its own included; None for all.
    """

    sliding_window: int | None

    @classmethod
    def read(cls, hf: Mapping[str, object], *, file: str) -> Config:
        """Reads a normalized config.json.

        Raises:
          ConfigError: a setting that is malformed, contradictory, unknown or not supported.
        """
        reader = Reader({**_DEFAULTS, **hf}, file)
        windowed = reader.has("sliding_window")
        config = cls(
            **pre_norm.settings(reader, "mistral"),
            sliding_window=reader.integer("sliding_window") if windowed else None,
        )
        reader.refuse_rest()
        return config


def parameters(config: Config, shards: int, transposed_linear: bool) -> list[ParamSpec]:
    """Every parameter of a model with this config, over so many shards."""
    declare = Declaration(config.axis_sizes(shards), transposed_linear)

    def layer(path: str) -> list[ParamSpec]:
        return [
            *attention_parameters(declare, path, bias=False, out_bias=False, kv="g"),
            *gated_mlp_parameters(declare, path, bias=False),
        ]

    return pre_norm.parameters(config, declare, layer, declare.norm_scale)


class Transformer(PreNormTransformer):
    """Mistral."""

    def __init__(self, config: Config, declared: Declared) -> None:
        super().__init__(
            config,
            declared,
            norm=partial(RMSNorm, declared, config.norm_eps),
            attention=partial(RotaryAttention, declared, config, window=config.sliding_window),
            feed_forward=partial(GatedMLP, declared, config.activation),
        )
