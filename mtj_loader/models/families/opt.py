"""OPT (Zhang et al., 2022, arXiv:2205.01068) and Galactica (Taylor et al., 2022, arXiv:2211.09085).

n shards   d model   e embedding   b batch   t time
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from mtj_loader.models.config import MAX_WIDTH, ConfigReader, ModelConfig
from mtj_loader.models.decoder import CausalTransformer, Layer, PostNormLayer
from mtj_loader.models.layers.attention import Attention
from mtj_loader.models.layers.embeddings import (
    PositionedEmbedding,
    ProjectedEmbedding,
    ProjectedProjection,
    Projection,
)
from mtj_loader.models.layers.feed_forward import MLP
from mtj_loader.models.layers.norms import LayerNorm
from mtj_loader.models.parameter_table import ParameterBuilder


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """What OPT adds.

    Attributes:
      norm_before: norms precede attention and MLP, instead of following each residual sum
        (OPT-350m).
      final_norm: whether there is a norm after the last layer.
      bias: whether linear layers have biases.
      affine_norms: whether norms have scale and offset.
    """

    model_type = "opt"
    spellings: ClassVar = {
        "hidden_act": ("activation_function",),
        "intermediate_size": ("ffn_dim",),
        "norm_eps": (),
    }
    defaults: ClassVar = {  # of transformers' OPTConfig
        "_remove_final_layer_norm": False,
        "do_layer_norm_before": True,
        "enable_bias": True,
        "hidden_act": "relu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "layer_norm_elementwise_affine": True,
        "max_position_embeddings": 2048,
        "norm_eps": 1e-5,  # torch's default
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "tie_word_embeddings": True,
        "vocab_size": 50272,
    }

    norm_before: bool
    final_norm: bool
    bias: bool
    affine_norms: bool

    @classmethod
    def read_own(cls, reader: ConfigReader, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the attributes above, and the width of the embedding."""
        before = reader.flag("do_layer_norm_before")
        return {
            "d_embed": reader.integer("word_embed_proj_dim", shared["d_model"], high=MAX_WIDTH),
            "norm_before": before,
            "final_norm": not reader.flag("_remove_final_layer_norm") and before,
            "bias": reader.flag("enable_bias"),
            "affine_norms": reader.flag("layer_norm_elementwise_affine"),
        }

    def supported_values(self) -> Mapping[str, object]:
        """What Galactica's configs say; transformers has no such switches."""
        return {"learned_embeddings": True, "scale_embeddings": False}


def make_model(config: Config, params: ParameterBuilder) -> CausalTransformer:
    """OPT."""
    affine, bias = config.affine_norms, config.bias
    projected = config.d_embed != config.d_model
    return CausalTransformer(
        config,
        params,
        norm=partial(LayerNorm, params, config.norm_eps, scale=affine, offset=affine),
        attention=lambda layer: Attention(params, bias=bias, out_bias=bias),
        feed_forward=partial(MLP, params, config.activation, bias=bias),
        layer=Layer if config.norm_before else PostNormLayer,
        final_norm=config.final_norm,
        embedding=ProjectedEmbedding if projected else PositionedEmbedding,
        projection=ProjectedProjection if projected else Projection,
    )
