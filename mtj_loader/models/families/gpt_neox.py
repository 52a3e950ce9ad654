"""GPT-NeoX (Black et al., 2022, arXiv:2204.06745): GPT-NeoX-20B, Pythia and relatives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from mtj_loader.models.config import ConfigReader, ModelConfig
from mtj_loader.models.decoder import CausalTransformer, Layer, ParallelLayer
from mtj_loader.models.layers.attention import FusedAttention
from mtj_loader.models.layers.feed_forward import MLP
from mtj_loader.models.layers.norms import LayerNorm
from mtj_loader.models.layers.positions import rotate_halves
from mtj_loader.models.parameter_table import ParameterBuilder


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """What GPT-NeoX adds.

    Attributes:
      parallel_residual: attention and MLP both read the layer's input and are added together.
      attention_bias: whether query_key_value and dense have biases.
    """

    model_type = "gpt_neox"
    spellings: ClassVar = {"norm_eps": ("layer_norm_eps",)}
    defaults: ClassVar = {  # of transformers' GPTNeoXConfig; its sizes are required here
        "attention_bias": True,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
    }
    rotary: ClassVar = {"fraction": 0.25}

    parallel_residual: bool
    attention_bias: bool

    @classmethod
    def read_own(cls, reader: ConfigReader, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the attributes above."""
        return {
            "parallel_residual": reader.flag("use_parallel_residual"),
            "attention_bias": reader.flag("attention_bias"),
        }


def make_model(config: Config, params: ParameterBuilder) -> CausalTransformer:
    """GPT-NeoX."""
    return CausalTransformer(
        config,
        params,
        norm=partial(LayerNorm, params, config.norm_eps),
        attention=lambda layer: FusedAttention(
            params, bias=config.attention_bias, rotate=rotate_halves
        ),
        feed_forward=partial(MLP, params, config.activation),
        layer=ParallelLayer if config.parallel_residual else Layer,
    )
