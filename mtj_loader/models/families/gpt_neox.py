"""GPT-NeoX (Black et al., 2022, arXiv:2204.06745): GPT-NeoX-20B, Pythia and their kin.

Defaults of absent settings are those of transformers' GPTNeoXConfig.

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

from mtj_loader.formats.hf_config import Reader
from mtj_loader.models.config import (
    MAX_LAYERS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    ModelConfig,
    head_dim,
)
from mtj_loader.models.decoder import NAME, CausalTransformer
from mtj_loader.models.layers import rope
from mtj_loader.models.layers.activations import ACTIVATIONS
from mtj_loader.models.layers.attention import KVCache, Span, attend, rotate_halves, update_cache
from mtj_loader.models.layers.parts import (
    Embedding,
    LayerNorm,
    Linear,
    Projection,
    add_residual,
    sum_over_shards,
)
from mtj_loader.models.parameter_table import Declaration, Declared
from mtj_loader.parameters import ParamSpec


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """What GPT-NeoX adds.

    Attributes:
      parallel_residual: attention and MLP both read the layer's input and are added at once.
      attention_bias: whether query_key_value and dense have biases.
    """

    parallel_residual: bool
    attention_bias: bool

    @classmethod
    def read(cls, hf: Mapping[str, object], *, file: str) -> Config:
        """Reads a normalized config.json.

        Raises:
          ConfigError: a setting that is malformed, contradictory, unknown or not supported.
        """
        reader = Reader(hf, file)
        size = head_dim(reader, "hidden_size", "num_attention_heads")
        heads = reader.integer("num_attention_heads")
        positions = reader.integer("max_position_embeddings", 2048)
        config = cls(
            model_type="gpt_neox",
            d_model=heads * size,
            layers=reader.integer("num_hidden_layers", high=MAX_LAYERS),
            n_heads=heads,
            n_kv_heads=heads,
            head_dim=size,
            d_embed=heads * size,
            d_ff=reader.integer("intermediate_size", high=MAX_WIDTH),
            vocab_size=reader.integer("vocab_size", high=MAX_VOCABULARY),
            max_positions=positions,
            norm_eps=reader.number("layer_norm_eps", 1e-5),
            activation=reader.choice("hidden_act", ACTIVATIONS, "gelu"),
            tie_word_embeddings=reader.flag("tie_word_embeddings", False),
            rope=rope.read(reader, head_dim=size, max_positions=positions, fraction=0.25),
            parallel_residual=reader.flag("use_parallel_residual", True),
            attention_bias=reader.flag("attention_bias", True),
        )
        reader.refuse_rest()
        return config


def parameters(config: Config, shards: int, transposed_linear: bool) -> list[ParamSpec]:
    """Every parameter of a model with this config, over so many shards."""
    sizes = {
        "V": config.padded_vocabulary(shards),
        "d": config.d_model,
        "f": config.d_ff,
        "h": config.n_heads,
        "k": config.head_dim,
    }
    declare = Declaration(sizes, transposed_linear)
    specs = [declare.parameter("embedding_shard/~/linear", "w", "V d", "V")]
    for i in range(config.layers):
        specs += _layer_parameters(declare, config, f"layer_{i}/~/")
    specs += declare.layer_norm("projection_shard/~/replicated_layer_norm")
    if not config.tie_word_embeddings:
        specs += declare.linear("projection_shard/~/linear", "d", "V", split="V", bias=False)
    return specs


def _layer_parameters(declare: Declaration, config: Config, layer: str) -> list[ParamSpec]:
    bias = config.attention_bias
    return [
        *declare.layer_norm(layer + "replicated_layer_norm"),
        *declare.layer_norm(layer + "replicated_layer_norm_1"),
        *declare.linear(layer + "combined_qkv", "d", "(h 3 k)", split="h", bias=bias),
        *declare.linear(layer + "linear_3", "(h k)", "d", split="h", bias=bias),
        *declare.linear(layer + "linear_4", "d", "f", split="f", bias=True),
        *declare.linear(layer + "linear_5", "f", "d", split="f", bias=True),
    ]


class Layer(hk.Module):
    """One layer; parallel and serial residual differ in what the MLP reads and when is summed."""

    def __init__(self, config: Config, declared: Declared, name: str) -> None:
        super().__init__(name=name)
        self._config = config
        self.attention_norm = LayerNorm(declared, config.norm_eps, name="replicated_layer_norm")
        self.mlp_norm = LayerNorm(declared, config.norm_eps, name="replicated_layer_norm_1")
        self._qkv = Linear(declared, name="combined_qkv")
        self._attention_out = Linear(declared, name="linear_3")
        self._up = Linear(declared, name="linear_4")
        self._down = Linear(declared, name="linear_5")

    def __call__(
        self, x: jax.Array, span: Span, memory: KVCache | None
    ) -> tuple[jax.Array, KVCache]:  # [b, t, d] -> [b, t, d]
        """The residual stream after this layer, and the keys and values it attended to."""
        attention, memory = self.attention(self.attention_norm(x), span, memory)
        if self._config.parallel_residual:
            mlp = self.mlp(self.mlp_norm(x))
            return add_residual(x, sum_over_shards(attention + mlp)), memory
        x = add_residual(x, sum_over_shards(attention))
        return add_residual(x, sum_over_shards(self.mlp(self.mlp_norm(x)))), memory

    def attention(
        self, x: jax.Array, span: Span, memory: KVCache | None
    ) -> tuple[jax.Array, KVCache]:  # [b, t, d] -> float32 [b, t, d]
        """This shard's term of the attention's output, and the keys and values it attended to."""
        qkv = self._qkv(x)
        qkv = qkv.reshape(*x.shape[:2], -1, 3, self._config.head_dim)  # [b, t, h/n, 3, k]
        q, k, v = jnp.moveaxis(qkv, 3, 0)  # [b, t, h/n, k] each
        assert span.rotation is not None  # Config.read always gives a rope
        q, k = rotate_halves(q, span.rotation), rotate_halves(k, span.rotation)
        memory = update_cache(memory, (k.astype(x.dtype), v.astype(x.dtype)), span.positions)
        scale = self._config.head_dim**-0.5
        heads = attend(q.astype(x.dtype), memory, span.visible, scale)
        return self._attention_out(heads.reshape(*x.shape[:2], -1)), memory

    def mlp(self, x: jax.Array) -> jax.Array:  # [b, t, d] -> float32 [b, t, d]
        """This shard's term of the MLP's output."""
        hidden = ACTIVATIONS[self._config.activation](self._up(x))  # float32 [b, t, f/n]
        return self._down(hidden.astype(x.dtype))


class Transformer(CausalTransformer):
    """GPT-NeoX."""

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
