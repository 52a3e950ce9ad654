"""Dense Qwen3 (Yang et al., 2025, arXiv:2505.09388): Qwen2 with normed queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from mtj_loader.models.decoder import CausalTransformer
from mtj_loader.models.families import qwen2
from mtj_loader.models.layers.norms import RMSNorm
from mtj_loader.models.llama_like import make_llama_like
from mtj_loader.models.parameter_table import ParameterBuilder


@dataclass(frozen=True, kw_only=True)
class Config(qwen2.Config):
    """The settings of Qwen3."""

    model_type = "qwen3"
    defaults: ClassVar = {  # of transformers' Qwen3Config
        **qwen2.Config.defaults,
        "attention_bias": False,
        "head_dim": 128,
    }


def make_model(config: Config, params: ParameterBuilder) -> CausalTransformer:
    """Qwen3."""
    norm = partial(RMSNorm, params, config.norm_eps, axis="k")
    return make_llama_like(config, params, attention={"q_norm": norm, "k_norm": norm})
