"""XGLM (Lin et al., 2021, arXiv:2112.10668), from fairseq: sinusoidal positions, scaled embedding.

Positions follow transformers; MTJ's own differ a little.

  n shards   d model   f feed-forward   V padded vocabulary   h heads   k head_dim
  b batch   t time
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from mtj_loader.formats.hf_config import Reader, canonicalize
from mtj_loader.models import pre_norm
from mtj_loader.models.config import (
    MAX_LAYERS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    ModelConfig,
    head_dim,
)
from mtj_loader.models.layers.activations import ACTIVATIONS
from mtj_loader.models.layers.attention import Span
from mtj_loader.models.layers.blocks import MLP, Attention, attention_parameters, mlp_parameters
from mtj_loader.models.layers.parts import LayerNorm
from mtj_loader.models.layers.positions import MIN_SINUSOIDAL_WIDTH, sinusoids
from mtj_loader.models.parameter_table import Declaration, Declared
from mtj_loader.models.pre_norm import PreNormTransformer
from mtj_loader.parameters import ParamSpec

# transformers' XGLMConfig
_SYNONYMS = {
    "hidden_size": "d_model",
    "num_attention_heads": "attention_heads",
    "num_hidden_layers": "num_layers",
}
_DEFAULTS: dict[str, object] = {
    "activation_function": "gelu",
    "attention_heads": 16,
    "d_model": 1024,
    "ffn_dim": 4096,
    "max_position_embeddings": 2048,
    "num_layers": 24,
    "pad_token_id": 1,
    "scale_embedding": True,
    "tie_word_embeddings": True,
    "vocab_size": 256008,
}
_NORM_EPS = 1e-5  # torch's default; the config has none
_HARMLESS = ("activation_dropout",)


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """What XGLM adds.

    Attributes:
      scale_embedding: token embeddings are multiplied by the square root of their width.
      pad_token_id: the row of the table of positions that is zero; position 0 has row 2.
    """

    scale_embedding: bool
    pad_token_id: int

    @classmethod
    def read(cls, hf: Mapping[str, object], *, file: str) -> Config:
        """Reads a normalized config.json.

        Raises:
          ConfigError: a setting that is malformed, contradictory, unknown or not supported.
        """
        full = canonicalize(hf, synonyms=_SYNONYMS, defaults=_DEFAULTS, file=file)
        reader = Reader(full, file)
        size = head_dim(reader, "d_model", "attention_heads")
        heads = reader.integer("attention_heads")
        config = cls(
            model_type="xglm",
            d_model=reader.integer("d_model", low=MIN_SINUSOIDAL_WIDTH),
            layers=reader.integer("num_layers", high=MAX_LAYERS),
            n_heads=heads,
            n_kv_heads=heads,
            head_dim=size,
            d_embed=heads * size,
            d_ff=reader.integer("ffn_dim", high=MAX_WIDTH),
            vocab_size=reader.integer("vocab_size", high=MAX_VOCABULARY),
            max_positions=reader.integer("max_position_embeddings"),
            norm_eps=_NORM_EPS,
            activation=reader.choice("activation_function", ACTIVATIONS),
            tie_word_embeddings=reader.flag("tie_word_embeddings"),
            rope=None,
            scale_embedding=reader.flag("scale_embedding"),
            pad_token_id=reader.integer("pad_token_id", low=0),
        )
        reader.refuse_rest(_HARMLESS)
        return config


def parameters(config: Config, shards: int, transposed_linear: bool) -> list[ParamSpec]:
    """Every parameter of a model with this config, over so many shards."""
    declare = Declaration(config.axis_sizes(shards), transposed_linear)

    def layer(path: str) -> list[ParamSpec]:
        attention = attention_parameters(declare, path, bias=True, out_bias=True)
        return [*attention, *mlp_parameters(declare, path, bias=True)]

    return pre_norm.parameters(config, declare, layer, declare.layer_norm)


class Transformer(PreNormTransformer):
    """XGLM."""

    def __init__(self, config: Config, declared: Declared) -> None:
        size = config.head_dim
        super().__init__(
            config,
            declared,
            norm=partial(LayerNorm, declared, config.norm_eps),
            attention=partial(Attention, declared, head_dim=size, scale=size**-0.5),
            feed_forward=partial(MLP, declared, config.activation),
        )
        self._config = config

    def embed(self, ids: jax.Array, span: Span) -> jax.Array:  # int32 [b, t] -> [b, t, d]
        """Scaled tokens and positions."""
        config, tokens = self._config, self.embedding(ids)
        scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        rows = sinusoids(span.positions, config.d_model, config.pad_token_id)
        return (tokens.astype(jnp.float32) * scale + rows).astype(tokens.dtype)
