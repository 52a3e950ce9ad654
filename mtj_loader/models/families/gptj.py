"""GPT-J (Wang and Komatsuzaki, 2021): one norm a layer, attention and MLP side by side.

n shards   d model   f feed-forward   V padded vocabulary   h heads   k head_dim
b batch   t time
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import haiku as hk
import jax
import jax.numpy as jnp

from mtj_loader.formats.hf_config import Reader, canonicalize
from mtj_loader.models.config import (
    MAX_LAYERS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    ModelConfig,
    head_dim,
)
from mtj_loader.models.decoder import NAME, CausalTransformer
from mtj_loader.models.layers import parts
from mtj_loader.models.layers.activations import ACTIVATIONS
from mtj_loader.models.layers.attention import KVCache, Span, rotate_pairs
from mtj_loader.models.layers.blocks import MLP, Attention, attention_parameters, mlp_parameters
from mtj_loader.models.layers.parts import LayerNorm, Projection, add_residual, sum_over_shards
from mtj_loader.models.layers.rope import DEFAULT_THETA, Rope
from mtj_loader.models.parameter_table import Declaration, Declared
from mtj_loader.parameters import ParamSpec

# transformers' GPTJConfig
_SYNONYMS = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_DEFAULTS: dict[str, object] = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "n_embd": 4096,
    "n_head": 16,
    "n_layer": 28,
    "n_positions": 2048,
    "rotary_dim": 64,
    "tie_word_embeddings": False,
    "vocab_size": 50400,
}
# For classification heads; and switches that neither MTJ nor transformers has for this family.
_HARMLESS = ("summary_activation", "summary_proj_to_labels", "summary_type", "summary_use_proj")
_HARMLESS_AT = {"rotary": True, "scale_attn_weights": True}


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """GPT-J adds nothing to what all families have."""

    @classmethod
    def read(cls, hf: Mapping[str, object], *, file: str) -> Config:
        """Reads a normalized config.json.

        Raises:
          ConfigError: a setting that is malformed, contradictory, unknown or not supported.
        """
        full = canonicalize(hf, synonyms=_SYNONYMS, defaults=_DEFAULTS, file=file)
        reader = Reader(full, file)
        size = head_dim(reader, "n_embd", "n_head")
        heads = reader.integer("n_head")
        positions = reader.integer("n_positions")
        config = cls(
            model_type="gptj",
            d_model=heads * size,
            layers=reader.integer("n_layer", high=MAX_LAYERS),
            n_heads=heads,
            n_kv_heads=heads,
            head_dim=size,
            d_embed=heads * size,
            d_ff=reader.integer("n_inner", 4 * heads * size, high=MAX_WIDTH),
            vocab_size=reader.integer("vocab_size", high=MAX_VOCABULARY),
            max_positions=positions,
            norm_eps=reader.number("layer_norm_epsilon"),
            activation=reader.choice("activation_function", ACTIVATIONS),
            tie_word_embeddings=reader.flag("tie_word_embeddings"),
            rope=_rope(reader, size, positions),
        )
        reader.refuse_rest(_HARMLESS, _HARMLESS_AT)
        return config


def _rope(reader: Reader, head_dim: int, positions: int) -> Rope:
    """Plain rotary embedding of `rotary_dim` dimensions, as if these were the whole head."""
    dims = reader.integer("rotary_dim", high=head_dim)
    if dims % 2:
        raise reader.error("rotary embedding turns pairs", "rotary_dim", "an even number")
    return Rope(theta=DEFAULT_THETA, head_dim=dims, fraction=1.0, trained_positions=positions)


def parameters(config: Config, shards: int, transposed_linear: bool) -> list[ParamSpec]:
    """Every parameter of a model with this config, over so many shards."""
    declare = Declaration(config.axis_sizes(shards), transposed_linear)
    specs = [
        declare.parameter("embedding_shard/~/linear", "w", "V d", "V"),
        declare.parameter("embedding_shard/~/linear", "b", "d", None),
    ]
    for i in range(config.layers):
        layer = f"layer_{i}/~/"
        specs += declare.layer_norm(layer + "replicated_layer_norm")
        specs += attention_parameters(declare, layer, bias=False, out_bias=False)
        specs += mlp_parameters(declare, layer, bias=True)
    specs += declare.layer_norm("projection_shard/~/replicated_layer_norm")
    weight, bias = declare.linear("projection_shard/~/linear", "d", "V", split="V", bias=True)
    return [*specs, bias] if config.tie_word_embeddings else [*specs, weight, bias]


class Embedding(parts.Embedding):
    """Token embedding with MTJ's bias: every shard adds its own."""

    def __call__(self, ids: jax.Array) -> jax.Array:  # int32 [b, t] -> [b, t, d]
        """The rows of these tokens, and the bias."""
        bias = sum_over_shards(self.table.parameter("b").astype(jnp.float32))
        return add_residual(super().__call__(ids), bias)


def turn_pairs(x: jax.Array, span: Span) -> jax.Array:  # float32 [b, t, h, k]
    """Rotary embedding of neighboring dimensions."""
    assert span.rotation is not None  # Config.read always gives a rope
    return rotate_pairs(x, span.rotation)


class Layer(hk.Module):
    """Attention and MLP both read the normed input; their sum is added at once."""

    def __init__(self, config: Config, declared: Declared, name: str) -> None:
        super().__init__(name=name)
        self.norm = LayerNorm(declared, config.norm_eps, name="replicated_layer_norm")
        scale = config.head_dim**-0.5
        self.attention = Attention(declared, head_dim=config.head_dim, scale=scale, turn=turn_pairs)
        self.mlp = MLP(declared, config.activation)

    def __call__(
        self, x: jax.Array, span: Span, memory: KVCache | None
    ) -> tuple[jax.Array, KVCache]:  # [b, t, d] -> [b, t, d]
        """The residual stream after this layer, and the keys and values it attended to."""
        normed = self.norm(x)
        attention, memory = self.attention(normed, span, memory)
        return add_residual(x, sum_over_shards(attention + self.mlp(normed))), memory


class Transformer(CausalTransformer):
    """GPT-J."""

    def __init__(self, config: Config, declared: Declared) -> None:
        super().__init__(name=NAME)
        self.rope = config.rope
        self.embedding = Embedding(declared, name="embedding_shard")
        names = [f"layer_{i}" for i in range(config.layers)]
        self.layers = [Layer(config, declared, name=name) for name in names]
        self.projection = Projection(
            declared,
            norm=partial(LayerNorm, declared, config.norm_eps),
            tied_to=self.embedding if config.tie_word_embeddings else None,
            name="projection_shard",
        )
