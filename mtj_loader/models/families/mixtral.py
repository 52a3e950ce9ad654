"""Mixtral (Jiang et al., 2024, arXiv:2401.04088): Mistral with a mixture of experts as MLP.

E experts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from mtj_loader.models.config import ConfigReader
from mtj_loader.models.decoder import CausalTransformer
from mtj_loader.models.layers.experts import MixtureOfExperts
from mtj_loader.models.llama_like import LlamaLikeConfig, make_llama_like
from mtj_loader.models.parameter_table import ParameterBuilder

MAX_EXPERTS = 2**12  # ten times what any published model has


@dataclass(frozen=True, kw_only=True)
class Config(LlamaLikeConfig):
    """What Mixtral adds.

    Attributes:
      n_experts: E.
      experts_per_token: how many of them each token uses.
      expert_parallel: distribute whole experts over the shards, instead of splitting each.
    """

    model_type = "mixtral"
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
    expert_parallel: bool = False

    @classmethod
    def read_own(cls, reader: ConfigReader, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the attributes above."""
        experts = reader.integer("num_local_experts", high=MAX_EXPERTS)
        return {
            **super().read_own(reader, shared),
            "n_experts": experts,
            "experts_per_token": reader.integer(
                "num_experts_per_tok", high=experts, given=["num_local_experts"]
            ),
        }

    def axis_sizes(self, shards: int) -> dict[str, int]:
        """Full sizes of the axes that parameters name."""
        return {**super().axis_sizes(shards), "E": self.n_experts}


def make_model(config: Config, params: ParameterBuilder) -> CausalTransformer:
    """Mixtral."""
    experts = partial(
        MixtureOfExperts,
        params,
        activation=config.activation,
        top_k=config.experts_per_token,
        expert_parallel=config.expert_parallel,
    )
    return make_llama_like(config, params, feed_forward=experts)
