"""StableLM (Stability AI, 2023; Bellagente et al., 2024, arXiv:2402.17834): Llama with layer norms.

Only a share of each head is rotated. With qk_layernorm, each head's norm has a scale of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from mtj_loader.models.config import ConfigReader
from mtj_loader.models.decoder import CausalTransformer, Layer, ParallelLayer
from mtj_loader.models.layers.norms import LayerNorm
from mtj_loader.models.llama_like import LlamaLikeConfig, make_llama_like
from mtj_loader.models.parameter_table import ParameterBuilder


@dataclass(frozen=True, kw_only=True)
class Config(LlamaLikeConfig):
    """What StableLM adds.

    Attributes:
      parallel_residual: attention and MLP both read the layer's norm and are added together.
      qk_norm: queries and keys are normed.
      qkv_bias: whether queries, keys and values have biases.
    """

    model_type = "stablelm"
    spellings: ClassVar = {"norm_eps": ("layer_norm_eps",)}
    defaults: ClassVar = {  # of transformers' StableLmConfig
        "hidden_act": "silu",
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "qk_layernorm": False,
        "tie_word_embeddings": False,
        "use_parallel_residual": False,
        "use_qkv_bias": False,
        "vocab_size": 50304,
    }
    rotary: ClassVar = {"fraction": 0.25}

    parallel_residual: bool
    qk_norm: bool
    qkv_bias: bool

    @classmethod
    def read_own(cls, reader: ConfigReader, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the attributes above."""
        return {
            **super().read_own(reader, shared),
            "parallel_residual": reader.flag("use_parallel_residual"),
            "qk_norm": reader.flag("qk_layernorm"),
            "qkv_bias": reader.flag("use_qkv_bias"),
        }


def make_model(config: Config, params: ParameterBuilder) -> CausalTransformer:
    """StableLM."""
    norm = partial(LayerNorm, params, config.norm_eps)
    attention: dict[str, Any] = {"bias": config.qkv_bias}
    if config.qk_norm:
        attention["q_norm"] = partial(norm, offset=False, axes="h k", split="h")
        attention["k_norm"] = partial(norm, offset=False, axes="g k", split="g")
    layer = partial(ParallelLayer, shared_norm=True) if config.parallel_residual else Layer
    return make_llama_like(config, params, norm=norm, attention=attention, layer=layer)
