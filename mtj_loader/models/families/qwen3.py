"""Qwen3 (Yang et al., 2025, arXiv:2505.09388), the dense models: Llama, queries and keys normed.

n shards   d model   f feed-forward   V padded vocabulary   h heads   g KV heads   k head_dim
b batch   t time
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

# transformers' Qwen3Config
_DEFAULTS: dict[str, object] = {
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
# What they say matters only where use_sliding_window is true, and no published model sets that.
_HARMLESS = ("max_window_layers", "sliding_window")


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """What Qwen3 adds.

    Attributes:
      attention_bias: whether the four linear layers of the attention have biases.
    """

    attention_bias: bool

    @classmethod
    def read(cls, hf: Mapping[str, object], *, file: str) -> Config:
        """Reads a normalized config.json.

        Raises:
          ConfigError: a setting that is malformed, contradictory, unknown or not supported.
        """
        reader = Reader({**_DEFAULTS, **hf}, file)
        config = cls(
            **pre_norm.settings(reader, "qwen3"),
            attention_bias=reader.flag("attention_bias"),
        )
        full = ["full_attention"] * config.layers
        reader.refuse_rest(_HARMLESS, {"use_sliding_window": False, "layer_types": full})
        return config


def parameters(config: Config, shards: int, transposed_linear: bool) -> list[ParamSpec]:
    """Every parameter of a model with this config, over so many shards."""
    declare = Declaration(config.axis_sizes(shards), transposed_linear)
    bias = config.attention_bias

    def layer(path: str) -> list[ParamSpec]:
        return [
            declare.parameter(path + "q_norm", "scale", "k", None),
            declare.parameter(path + "k_norm", "scale", "k", None),
            *attention_parameters(declare, path, bias=bias, out_bias=bias, kv="g"),
            *gated_mlp_parameters(declare, path, bias=False),
        ]

    return pre_norm.parameters(config, declare, layer, declare.norm_scale)


class Transformer(PreNormTransformer):
    """Qwen3."""

    def __init__(self, config: Config, declared: Declared) -> None:
        norm = partial(RMSNorm, declared, config.norm_eps)

        def attention() -> RotaryAttention:
            norms = {"q_norm": norm(name="q_norm"), "k_norm": norm(name="k_norm")}
            return RotaryAttention(declared, config, **norms)

        super().__init__(
            config,
            declared,
            norm=norm,
            attention=attention,
            feed_forward=partial(GatedMLP, declared, config.activation),
        )
