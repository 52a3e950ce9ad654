"""XGLM (Lin et al., 2021, arXiv:2112.10668), from fairseq: sinusoidal positions, scaled embedding.

Positions follow transformers; MTJ's own differ a little.

  b batch   t time   d model
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mtj_loader.models.config import ConfigReader, ModelConfig
from mtj_loader.models.decoder import CausalTransformer
from mtj_loader.models.layers import embeddings
from mtj_loader.models.layers.attention import Attention
from mtj_loader.models.layers.embeddings import MIN_SINUSOIDAL_WIDTH, sinusoids
from mtj_loader.models.layers.feed_forward import MLP
from mtj_loader.models.layers.norms import LayerNorm
from mtj_loader.models.layers.positions import Positions
from mtj_loader.models.parameter_table import ParameterBuilder


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """What XGLM adds.

    Attributes:
      scale_embedding: token embeddings are multiplied by the square root of their width.
      pad_token_id: the row of the table of positions that is zero; position 0 has row 2.
    """

    model_type = "xglm"
    spellings: ClassVar = {
        "hidden_act": ("activation_function",),
        "hidden_size": ("d_model", "hidden_size"),
        "intermediate_size": ("ffn_dim",),
        "norm_eps": (),
        "num_attention_heads": ("attention_heads", "num_attention_heads"),
        "num_hidden_layers": ("num_layers", "num_hidden_layers"),
    }
    defaults: ClassVar = {  # of transformers' XGLMConfig
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "max_position_embeddings": 2048,
        "norm_eps": 1e-5,  # torch's default
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "pad_token_id": 1,
        "scale_embedding": True,
        "tie_word_embeddings": True,
        "vocab_size": 256008,
    }

    scale_embedding: bool
    pad_token_id: int

    @classmethod
    def read_own(cls, reader: ConfigReader, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the attributes above, and checks the width of sinusoids."""
        reader.integer("hidden_size", low=MIN_SINUSOIDAL_WIDTH)
        return {
            "scale_embedding": reader.flag("scale_embedding"),
            "pad_token_id": reader.integer("pad_token_id", low=0),
        }


class Embedding(embeddings.Embedding):
    """Scaled tokens plus sinusoidal positions."""

    def __init__(self, config: Config, params: ParameterBuilder, name: str) -> None:
        super().__init__(params, name)
        self._config = config

    def __call__(self, ids: jax.Array, positions: Positions) -> jax.Array:  # [b, t, d]
        """The tokens plus their positions."""
        config, tokens = self._config, self.tokens(ids)
        scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        rows = sinusoids(positions.queries, config.d_model, config.pad_token_id)
        return (tokens.astype(jnp.float32) * scale + rows).astype(tokens.dtype)


def make_model(config: Config, params: ParameterBuilder) -> CausalTransformer:
    """XGLM."""
    return CausalTransformer(
        config,
        params,
        norm=partial(LayerNorm, params, config.norm_eps),
        attention=lambda layer: Attention(params, bias=True, out_bias=True),
        feed_forward=partial(MLP, params, config.activation),
        embedding=partial(Embedding, config),
    )
