"""BLOOM (Le Scao et al., 2022, arXiv:2211.05100): ALiBi, and a norm behind the embedding.

n shards   d model   f feed-forward   V padded vocabulary   h heads   k head_dim
b batch   t time
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import haiku as hk
import jax

from mtj_loader.formats.hf_config import Reader, canonicalize
from mtj_loader.models.config import MAX_LAYERS, MAX_VOCABULARY, ModelConfig, head_dim
from mtj_loader.models.decoder import NAME, CausalTransformer
from mtj_loader.models.layers import parts
from mtj_loader.models.layers.alibi import alibi, bloom_slopes
from mtj_loader.models.layers.attention import KVCache, Span, attend, update_cache
from mtj_loader.models.layers.blocks import MLP, mlp_parameters, split_qkv
from mtj_loader.models.layers.parts import (
    LayerNorm,
    Linear,
    Projection,
    add_residual,
    sum_over_shards,
)
from mtj_loader.models.parameter_table import Declaration, Declared
from mtj_loader.parameters import ParamSpec

# transformers' BloomConfig
_SYNONYMS = {
    "n_embed": "hidden_size",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_DEFAULTS: dict[str, object] = {
    "apply_residual_connection_post_layernorm": False,
    "hidden_size": 64,
    "layer_norm_epsilon": 1e-5,
    "n_head": 8,
    "n_layer": 2,
    "tie_word_embeddings": True,
    "vocab_size": 250880,
}
_ACTIVATION = "gelu_pytorch_tanh"  # the config has no choice
_DEFAULT_LENGTH = 2048  # what BLOOM was trained with; ALiBi itself sets no limit
# How the training code was to fuse and to round; and ALiBi's table there.
_HARMLESS = (
    "attention_softmax_in_fp32", "offset_alibi", "skip_bias_add", "skip_bias_add_qkv",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """What BLOOM adds.

    Attributes:
      residual_after_norm: residual sums start from the normed stream.
    """

    residual_after_norm: bool

    @classmethod
    def read(cls, hf: Mapping[str, object], *, file: str) -> Config:
        """Reads a normalized config.json.

        Raises:
          ConfigError: a setting that is malformed, contradictory, unknown or not supported.
        """
        full = canonicalize(hf, synonyms=_SYNONYMS, defaults=_DEFAULTS, file=file)
        reader = Reader(full, file)
        size = head_dim(reader, "hidden_size", "n_head")
        heads = reader.integer("n_head")
        width = heads * size
        config = cls(
            model_type="bloom",
            d_model=width,
            layers=reader.integer("n_layer", high=MAX_LAYERS),
            n_heads=heads,
            n_kv_heads=heads,
            head_dim=size,
            d_embed=width,
            d_ff=4 * width,
            vocab_size=reader.integer("vocab_size", high=MAX_VOCABULARY),
            max_positions=reader.integer("seq_length", _DEFAULT_LENGTH),
            norm_eps=reader.number("layer_norm_epsilon"),
            activation=_ACTIVATION,
            tie_word_embeddings=reader.flag("tie_word_embeddings"),
            rope=None,
            residual_after_norm=reader.flag("apply_residual_connection_post_layernorm"),
        )
        # With slow_but_exact transformers leaves out biases where pretraining_tp is above 1.
        reader.refuse_rest(_HARMLESS, {"n_inner": 4 * width, "slow_but_exact": False})
        return config


def parameters(config: Config, shards: int, transposed_linear: bool) -> list[ParamSpec]:
    """Every parameter of a model with this config, over so many shards."""
    declare = Declaration(config.axis_sizes(shards), transposed_linear)
    specs = [declare.parameter("embedding_shard/~/linear", "w", "V d", "V")]
    specs += declare.layer_norm("embedding_shard/~/replicated_layer_norm")
    for i in range(config.layers):
        layer = f"layer_{i}/~/"
        specs += declare.layer_norm(layer + "replicated_layer_norm")
        specs += declare.layer_norm(layer + "replicated_layer_norm_1")
        specs += declare.linear(layer + "combined_qkv", "d", "(h 3 k)", split="h", bias=True)
        specs += declare.linear(layer + "linear_3", "(h k)", "d", split="h", bias=True)
        specs += mlp_parameters(declare, layer, bias=True)
    specs += declare.layer_norm("projection_shard/~/replicated_layer_norm")
    if not config.tie_word_embeddings:
        specs += declare.linear("projection_shard/~/linear", "d", "V", split="V", bias=False)
    return specs


class Embedding(parts.Embedding):
    """Token embedding, normed."""

    def __init__(self, declared: Declared, eps: float, name: str) -> None:
        super().__init__(declared, name)
        self.norm = LayerNorm(declared, eps, name="replicated_layer_norm")

    def __call__(self, ids: jax.Array) -> jax.Array:  # int32 [b, t] -> [b, t, d]
        """The normed rows of these tokens."""
        return self.norm(super().__call__(ids))


class Layer(hk.Module):
    """Attention, then MLP, each behind its norm."""

    def __init__(self, config: Config, declared: Declared, name: str) -> None:
        super().__init__(name=name)
        self._config = config
        norm = partial(LayerNorm, declared, config.norm_eps)
        self.attention_norm = norm(name="replicated_layer_norm")
        self.mlp_norm = norm(name="replicated_layer_norm_1")
        self._qkv = Linear(declared, name="combined_qkv")
        self._attention_out = Linear(declared, name="linear_3")
        self.mlp = MLP(declared, config.activation)

    def __call__(
        self, x: jax.Array, span: Span, memory: KVCache | None
    ) -> tuple[jax.Array, KVCache]:  # [b, t, d] -> [b, t, d]
        """The residual stream after this layer, and the keys and values it attended to."""
        normed = self.attention_norm(x)
        attention, memory = self.attention(normed, span, memory)
        x = self._residual(x, normed)
        x = add_residual(x, sum_over_shards(attention))
        normed = self.mlp_norm(x)
        x = self._residual(x, normed)
        return add_residual(x, sum_over_shards(self.mlp(normed))), memory

    def _residual(self, x: jax.Array, normed: jax.Array) -> jax.Array:  # [b, t, d]
        return normed if self._config.residual_after_norm else x

    def attention(
        self, x: jax.Array, span: Span, memory: KVCache | None
    ) -> tuple[jax.Array, KVCache]:  # [b, t, d] -> float32 [b, t, d]
        """This shard's term of the attention's output, and the keys and values it attended to."""
        size = self._config.head_dim
        q, k, v = split_qkv(self._qkv(x).astype(x.dtype), size)
        memory = update_cache(memory, (k, v), span.positions)
        bias = alibi(bloom_slopes(self._config.n_heads), span)
        heads = attend(q, memory, span.visible, size**-0.5, bias)
        return self._attention_out(heads.reshape(*x.shape[:2], -1)), memory


class Transformer(CausalTransformer):
    """BLOOM."""

    def __init__(self, config: Config, declared: Declared) -> None:
        super().__init__(name=NAME)
        self.rope = config.rope
        self.embedding = Embedding(declared, config.norm_eps, name="embedding_shard")
        names = [f"layer_{i}" for i in range(config.layers)]
        self.layers = [Layer(config, declared, name=name) for name in names]
        self.projection = Projection(
            declared,
            norm=partial(LayerNorm, declared, config.norm_eps),
            tied_to=self.embedding if config.tie_word_embeddings else None,
            name="projection_shard",
        )
