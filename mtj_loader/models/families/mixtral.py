"""Mixtral (Jiang et al., 2024, arXiv:2401.04088): Mistral with a mixture of experts as MLP.

E experts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from mtj_loader.models.config import ConfigReader, ModelConfig
from mtj_loader.models.decoder import CausalTransformer, Layer
from mtj_loader.models.layers.attention import Attention
from mtj_loader.models.layers.experts import MixtureOfExperts
from mtj_loader.models.layers.norms import RMSNorm
from mtj_loader.models.layers.positions import rotate_halves
from mtj_loader.models.parameter_table import ParameterBuilder

MAX_EXPERTS = 2**12  # ten times what any published model has


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """What Mixtral adds.

    Attributes:
      n_experts: E.
      experts_per_token: how many of them each token uses.
      sliding_window: how many positions back a token sees, its own included; None for all.
      expert_parallel: distribute whole experts over the shards, instead of splitting each.
    """

    model_type = "mixtral"
    spellings: ClassVar = {"norm_eps": ("rms_norm_eps",)}
    defaults: ClassVar = {  # of transformers' MixtralConfig
        "head_dim": None,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "norm_eps": 1e-5,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }
    rotary: ClassVar = {"fraction": 1.0, "theta": 1e6, "whole_heads": True}
    ignored_keys = (
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
    )  # training

    n_experts: int
    experts_per_token: int
    sliding_window: int | None
    expert_parallel: bool = False

    @classmethod
    def read_own(cls, reader: ConfigReader, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the attributes above."""
        experts = reader.integer("num_local_experts", high=MAX_EXPERTS)
        windowed = reader.has("sliding_window")
        return {
            "n_experts": experts,
            "experts_per_token": reader.integer("num_experts_per_tok", high=experts),
            "sliding_window": reader.integer("sliding_window") if windowed else None,
        }

    def axis_sizes(self, shards: int) -> dict[str, int]:
        """Full sizes of the axes that parameters name."""
        return {**super().axis_sizes(shards), "E": self.n_experts}


def make_model(config: Config, params: ParameterBuilder) -> CausalTransformer:
    """Mixtral."""
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

    def feed_forward(index: int) -> MixtureOfExperts:
        return MixtureOfExperts(
            params,
            activation=config.activation,
            top_k=config.experts_per_token,
            expert_parallel=config.expert_parallel,
        )

    layer = partial(Layer, norm=norm, attention=attention, feed_forward=feed_forward)
    return CausalTransformer(config, params, norm=norm, layer=layer)
