"""MPT (MosaicML, 2023), with the options of mosaicml/llm-foundry.

n shards   d model   f feed-forward   V padded vocabulary   h heads   k head_dim   p positions
b batch   t time
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from mtj_loader.models.layers.alibi import alibi, mpt_slopes
from mtj_loader.models.layers.attention import KVCache, Span, attend, update_cache
from mtj_loader.models.layers.blocks import MLP, mlp_parameters, split_qkv
from mtj_loader.models.layers.parts import Embedding, LayerNorm, Linear, Projection, SplitLayerNorm
from mtj_loader.models.layers.positions import PositionedEmbedding, learned_positions
from mtj_loader.models.parameter_table import Declaration, Declared
from mtj_loader.models.pre_norm import PreNormTransformer
from mtj_loader.parameters import ParamSpec

# transformers' MptConfig and MptAttentionConfig
_SYNONYMS = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
}
_DEFAULTS: dict[str, object] = {
    "d_model": 2048,
    "expansion_ratio": 4,
    "layer_norm_epsilon": 1e-5,
    "learned_pos_emb": True,
    "max_seq_len": 2048,
    "n_heads": 16,
    "n_layers": 24,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "tie_word_embeddings": True,
    "vocab_size": 50368,
}
_NORMS = ("low_precision_layernorm", "layernorm")  # float32 in both: it is at least as precise
_INVERSE_ROOT = "inv_sqrt_d_model"

_HARMLESS = ("emb_pdrop", "embedding_fraction", "init_config", "init_device", "tokenizer_name")
_HARMLESS_AT = {"fc_type": "torch", "ffn_config": {"ffn_type": "mptmlp"}, "verbose": 0}
_ATTENTION_HARMLESS = ("attn_impl", "rope_dail_config", "rope_hf_config", "rope_impl", "rope_theta")
_ATTENTION_HARMLESS_AT = {
    "attn_logit_softcapping": None,
    "attn_type": "multihead_attention",
    "attn_uses_sequence_id": False,
    "fc_type": "torch",
    "prefix_lm": False,
    "qk_gn": False,
    "rope": False,
    "sliding_window_size": -1,
}


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """What MPT adds.

    Attributes:
      bias: whether linear layers and norms have biases.
      learned_positions: whether there is a table of positions.
      alibi_bias_max: exponent of the smallest ALiBi slope; None without ALiBi.
      clip_qkv: queries, keys and values are clamped to ± this; None for no bound.
      qk_norm: queries and keys are normed, over all heads at once.
      softmax_scale: of the scores.
      logit_scale: of the logits.
    """

    bias: bool
    learned_positions: bool
    alibi_bias_max: float | None
    clip_qkv: float | None
    qk_norm: bool
    softmax_scale: float
    logit_scale: float

    @classmethod
    def read(cls, hf: Mapping[str, object], *, file: str) -> Config:
        """Reads a normalized config.json.

        Raises:
          ConfigError: a setting that is malformed, contradictory, unknown or not supported.
        """
        full = canonicalize(hf, synonyms=_SYNONYMS, defaults=_DEFAULTS, file=file)
        reader = Reader(full, file)
        attention = reader.section("attn_config")
        size = head_dim(reader, "d_model", "n_heads")
        heads = reader.integer("n_heads")
        width = heads * size
        reader.choice("norm_type", _NORMS)
        with_alibi, bias_max = attention.flag("alibi", True), attention.number("alibi_bias_max", 8)
        config = cls(
            model_type="mpt",
            d_model=width,
            layers=reader.integer("n_layers", high=MAX_LAYERS),
            n_heads=heads,
            n_kv_heads=heads,
            head_dim=size,
            d_embed=width,
            d_ff=_d_ff(reader, width),
            vocab_size=reader.integer("vocab_size", high=MAX_VOCABULARY),
            max_positions=reader.integer("max_seq_len"),
            norm_eps=reader.number("layer_norm_epsilon"),
            activation="gelu",
            tie_word_embeddings=reader.flag("tie_word_embeddings"),
            rope=None,
            bias=not reader.flag("no_bias"),
            learned_positions=reader.flag("learned_pos_emb") and not with_alibi,
            alibi_bias_max=bias_max if with_alibi else None,
            clip_qkv=attention.number("clip_qkv", 0) or None,  # 0 means none there, too
            qk_norm=attention.flag("qk_ln", False),
            softmax_scale=attention.number("softmax_scale", size**-0.5),
            logit_scale=_logit_scale(reader, full.get("logit_scale"), width),
        )
        kv_heads: dict[str, object] = {"kv_n_heads": heads}
        attention.refuse_rest(_ATTENTION_HARMLESS, _ATTENTION_HARMLESS_AT | kv_heads)
        reader.refuse_rest(_HARMLESS, _HARMLESS_AT)
        return config


def _d_ff(reader: Reader, width: int) -> int:
    ratio = reader.number("expansion_ratio")
    if not 1 <= ratio * width <= MAX_WIDTH or ratio * width % 1:
        what = "no width of a feed-forward layer"
        raise reader.error(what, "expansion_ratio", f"a whole number when multiplied by {width}")
    return int(ratio * width)


def _logit_scale(reader: Reader, value: object, width: int) -> float:
    if isinstance(value, str):
        reader.choice("logit_scale", [_INVERSE_ROOT])
        return width**-0.5
    return reader.number("logit_scale", 1.0)


def parameters(config: Config, shards: int, transposed_linear: bool) -> list[ParamSpec]:
    """Every parameter of a model with this config, over so many shards."""
    declare = Declaration(config.axis_sizes(shards), transposed_linear)
    norm_params = ("scale", "offset") if config.bias else ("scale",)

    def layer(path: str) -> list[ParamSpec]:
        norms = ("q_norm", "k_norm") if config.qk_norm else ()
        return [
            *(declare.parameter(path + n, p, "(h k)", "h") for n in norms for p in norm_params),
            *declare.linear(path + "combined_qkv", "d", "(h 3 k)", split="h", bias=config.bias),
            *declare.linear(path + "linear_3", "(h k)", "d", split="h", bias=config.bias),
            *mlp_parameters(declare, path, bias=config.bias),
        ]

    norm = declare.layer_norm if config.bias else declare.norm_scale
    specs = pre_norm.parameters(config, declare, layer, norm)
    return [*specs, learned_positions(declare)] if config.learned_positions else specs


class Attention:
    """Fused attention; bounds, norms and biases as the config has them."""

    def __init__(self, declared: Declared, config: Config) -> None:
        self._config = config
        self._qkv = Linear(declared, name="combined_qkv")
        self._out = Linear(declared, name="linear_3")
        if config.qk_norm:
            self._q_norm = SplitLayerNorm(declared, config.norm_eps, name="q_norm")
            self._k_norm = SplitLayerNorm(declared, config.norm_eps, name="k_norm")

    def __call__(
        self, x: jax.Array, span: Span, memory: KVCache | None
    ) -> tuple[jax.Array, KVCache]:  # [b, t, d] -> float32 [b, t, d]
        """This shard's term of the output, and the keys and values it attended to."""
        q, k, v = (y.astype(x.dtype) for y in self._queries_keys_values(x))
        memory = update_cache(memory, (k, v), span.positions)
        heads = attend(q, memory, span.visible, self._config.softmax_scale, self._bias(span))
        return self._out(heads.reshape(*x.shape[:2], -1)), memory

    def _queries_keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Float32 [b, t, h, k] each."""
        qkv, bound = self._qkv(x), self._config.clip_qkv
        qkv = qkv if bound is None else jnp.clip(qkv, -bound, bound)
        q, k, v = split_qkv(qkv, self._config.head_dim)
        if self._config.qk_norm:
            width = (*x.shape[:2], -1)  # all heads of the shard
            q = self._q_norm(q.reshape(width)).reshape(q.shape)
            k = self._k_norm(k.reshape(width)).reshape(k.shape)
        return q, k, v

    def _bias(self, span: Span) -> jax.Array | None:  # float32 [b or 1, h, t, T]
        if self._config.alibi_bias_max is None:
            return None
        return alibi(mpt_slopes(self._config.n_heads, self._config.alibi_bias_max), span)


class ScaledProjection(Projection):
    """The final norm, then logits times a constant."""

    def __init__(self, declared: Declared, *, scale: float, **options: Any) -> None:  # noqa: ANN401
        super().__init__(declared, **options)
        self._scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., d] -> float32 [..., V/n]
        """The logits, those of the padding included."""
        return super().__call__(x) * self._scale


class Transformer(PreNormTransformer):
    """MPT."""

    def __init__(self, config: Config, declared: Declared) -> None:
        super().__init__(
            config,
            declared,
            norm=partial(LayerNorm, declared, config.norm_eps),
            attention=partial(Attention, declared, config),
            feed_forward=partial(MLP, declared, config.activation),
            embedding=PositionedEmbedding if config.learned_positions else Embedding,
            projection=partial(ScaledProjection, scale=config.logit_scale),
        )

    def embed(self, ids: jax.Array, span: Span) -> jax.Array:  # int32 [b, t] -> [b, t, d]
        """Tokens, and positions where they are learned."""
        if isinstance(self.embedding, PositionedEmbedding):
            return self.embedding.at(ids, span.positions)
        return self.embedding(ids)
