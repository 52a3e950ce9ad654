"""Mixtral (Jiang et al., 2024, arXiv:2401.04088): Mistral with a mixture of experts as MLP.

n shards   d model   f feed-forward   V padded vocabulary   h heads   g KV heads   k head_dim
E experts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from mtj_loader.formats.hf_config import Reader
from mtj_loader.models import pre_norm
from mtj_loader.models.config import ModelConfig
from mtj_loader.models.layers.blocks import attention_parameters
from mtj_loader.models.layers.experts import MixtureOfExperts, expert_parameters
from mtj_loader.models.layers.parts import RMSNorm
from mtj_loader.models.parameter_table import Declaration, Declared
from mtj_loader.models.pre_norm import PreNormTransformer, RotaryAttention
from mtj_loader.parameters import ParamSpec

# transformers' MixtralConfig
_DEFAULTS: dict[str, object] = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
_DEFAULT_THETA = 1e6
MAX_EXPERTS = 2**12  # ten times what any published model has
_HARMLESS = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")  # training


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """What Mixtral adds.

    Attributes:
      n_experts: E.
      experts_per_token: how many of them each token uses.
      sliding_window: how many positions back a token sees, its own included; None for all.
      expert_parallel: whole experts are dealt over the shards, instead of a part of each.
    """

    n_experts: int
    experts_per_token: int
    sliding_window: int | None
    expert_parallel: bool = False

    @classmethod
    def read(cls, hf: Mapping[str, object], *, file: str) -> Config:
        """Reads a normalized config.json.

        Raises:
          ConfigError: a setting that is malformed, contradictory, unknown or not supported.
        """
        reader = Reader({**_DEFAULTS, **hf}, file)
        windowed = reader.has("sliding_window")
        experts = reader.integer("num_local_experts", high=MAX_EXPERTS)
        config = cls(
            **pre_norm.settings(reader, "mixtral", theta=_DEFAULT_THETA),
            n_experts=experts,
            experts_per_token=reader.integer("num_experts_per_tok", high=experts),
            sliding_window=reader.integer("sliding_window") if windowed else None,
        )
        reader.refuse_rest(_HARMLESS)
        return config

    def axis_sizes(self, shards: int) -> dict[str, int]:
        """Full sizes of the axes that declarations name."""
        return {**super().axis_sizes(shards), "E": self.n_experts}


def parameters(config: Config, shards: int, transposed_linear: bool) -> list[ParamSpec]:
    """Every parameter of a model with this config, over so many shards."""
    declare = Declaration(config.axis_sizes(shards), transposed_linear)

    def layer(path: str) -> list[ParamSpec]:
        return [
            *attention_parameters(declare, path, bias=False, out_bias=False, kv="g"),
            *expert_parameters(declare, path, whole=config.expert_parallel),
        ]

    return pre_norm.parameters(config, declare, layer, declare.norm_scale)


class Transformer(PreNormTransformer):
    """Mixtral."""

    def __init__(self, config: Config, declared: Declared) -> None:
        super().__init__(
            config,
            declared,
            norm=partial(RMSNorm, declared, config.norm_eps),
            attention=partial(RotaryAttention, declared, config, window=config.sliding_window),
            feed_forward=partial(
                MixtureOfExperts,
                declared,
                activation=config.activation,
                top_k=config.experts_per_token,
            ),
        )
