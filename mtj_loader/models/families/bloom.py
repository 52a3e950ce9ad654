"""BLOOM (Le Scao et al., 2022, arXiv:2211.05100): ALiBi, and a norm after the embedding.

b batch   t time   d model
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax

from mtj_loader.models.config import ConfigReader, ModelConfig
from mtj_loader.models.decoder import CausalTransformer, Layer, NormedResidualLayer
from mtj_loader.models.layers import embeddings
from mtj_loader.models.layers.alibi import alibi, bloom_slopes
from mtj_loader.models.layers.attention import FusedAttention
from mtj_loader.models.layers.feed_forward import MLP
from mtj_loader.models.layers.norms import LayerNorm
from mtj_loader.models.layers.positions import Positions
from mtj_loader.models.parameter_table import ParameterBuilder


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """What BLOOM adds.

    Attributes:
      residual_after_norm: residual sums start from the normed stream.
    """

    model_type = "bloom"
    spellings: ClassVar = {
        "hidden_act": (),
        "hidden_size": ("hidden_size", "n_embed"),
        "intermediate_size": (),
        "max_position_embeddings": ("seq_length",),
        "norm_eps": ("layer_norm_epsilon",),
        "num_attention_heads": ("n_head", "num_attention_heads"),
        "num_hidden_layers": ("n_layer", "num_hidden_layers"),
    }
    defaults: ClassVar = {  # of transformers' BloomConfig
        "apply_residual_connection_post_layernorm": False,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 64,
        "intermediate_size": None,
        "max_position_embeddings": 2048,  # the trained length; ALiBi itself sets no limit
        "norm_eps": 1e-5,
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
        "vocab_size": 250880,
    }

    residual_after_norm: bool

    @classmethod
    def read_own(cls, reader: ConfigReader, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the attribute above."""
        after_norm = reader.flag("apply_residual_connection_post_layernorm")
        return {"residual_after_norm": after_norm}

    def supported_values(self) -> Mapping[str, object]:
        """With slow_but_exact, transformers leaves out biases if pretraining_tp is above 1."""
        return {"n_inner": self.d_ff, "slow_but_exact": False}


class Embedding(embeddings.Embedding):
    """Token embedding with a norm."""

    def __init__(self, params: ParameterBuilder, eps: float, name: str) -> None:
        super().__init__(params, name)
        self.norm = LayerNorm(params, eps, name="replicated_layer_norm")

    def __call__(self, ids: jax.Array, positions: Positions) -> jax.Array:  # [b, t, d]
        """The normed rows of these tokens."""
        return self.norm(self.tokens(ids))


def make_model(config: Config, params: ParameterBuilder) -> CausalTransformer:
    """BLOOM."""
    score_bias = partial(alibi, bloom_slopes(config.n_heads))
    return CausalTransformer(
        config,
        params,
        norm=partial(LayerNorm, params, config.norm_eps),
        attention=lambda layer: FusedAttention(params, bias=True, score_bias=score_bias),
        feed_forward=partial(MLP, params, config.activation),
        layer=NormedResidualLayer if config.residual_after_norm else Layer,
        embedding=partial(Embedding, eps=config.norm_eps),
    )
