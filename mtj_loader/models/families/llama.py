"""Llama (Touvron et al., 2023, arXiv:2302.13971; Llama 2 and 3), and whoever took its layout.

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

# transformers' LlamaConfig
_DEFAULTS: dict[str, object] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """What Llama adds.

    Attributes:
      attention_bias: whether the four linear layers of the attention have biases.
      mlp_bias: whether the three of the MLP have.
    """

    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def read(cls, hf: Mapping[str, object], *, file: str) -> Config:
        """Reads a normalized config.json.

        Raises:
          ConfigError: a setting that is malformed, contradictory, unknown or not supported.
        """
        reader = Reader({**_DEFAULTS, **hf}, file)
        config = cls(
            **pre_norm.settings(reader, "llama"),
            attention_bias=reader.flag("attention_bias"),
            mlp_bias=reader.flag("mlp_bias"),
        )
        reader.refuse_rest()
        return config


def parameters(config: Config, shards: int, transposed_linear: bool) -> list[ParamSpec]:
    """Every parameter of a model with this config, over so many shards."""
    declare = Declaration(config.axis_sizes(shards), transposed_linear)
    bias = config.attention_bias

    def layer(path: str) -> list[ParamSpec]:
        return [
            *attention_parameters(declare, path, bias=bias, out_bias=bias, kv="g"),
            *gated_mlp_parameters(declare, path, bias=config.mlp_bias),
        ]

    return pre_norm.parameters(config, declare, layer, declare.norm_scale)


class Transformer(PreNormTransformer):
    """Llama."""

    def __init__(self, config: Config, declared: Declared) -> None:
        super().__init__(
            config,
            declared,
            norm=partial(RMSNorm, declared, config.norm_eps),
            attention=partial(RotaryAttention, declared, config),
            feed_forward=partial(GatedMLP, declared, config.activation),
        )
