"""OPT (Zhang et al., 2022, arXiv:2205.01068) and Galactica (Taylor et al., 2022, arXiv:2211.09085).

n shards   d model   e embedding   f feed-forward   V padded vocabulary   h heads   k head_dim
p positions   b batch   t time
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax

from mtj_loader.formats.hf_config import Reader, canonicalize
from mtj_loader.models import pre_norm
from mtj_loader.models.config import (
    MAX_LAYERS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    ModelConfig,
    head_dim,
)
from mtj_loader.models.decoder import NAME, CausalTransformer
from mtj_loader.models.layers.activations import ACTIVATIONS
from mtj_loader.models.layers.attention import KVCache, Span
from mtj_loader.models.layers.blocks import MLP, Attention, attention_parameters, mlp_parameters
from mtj_loader.models.layers.parts import (
    LayerNorm,
    Projection,
    add_residual,
    gather_columns,
    sum_over_shards,
)
from mtj_loader.models.layers.positions import PositionedEmbedding, learned_positions
from mtj_loader.models.parameter_table import Declaration, Declared
from mtj_loader.parameters import ParamSpec

# transformers' OPTConfig
_DEFAULTS: dict[str, object] = {
    "_remove_final_layer_norm": False,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "enable_bias": True,
    "ffn_dim": 3072,
    "hidden_size": 768,
    "layer_norm_elementwise_affine": True,
    "max_position_embeddings": 2048,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "tie_word_embeddings": True,
    "vocab_size": 50272,
}
_NORM_EPS = 1e-5  # torch's default; the config has none
_HARMLESS = ("activation_dropout",)
# Galactica's configs say these; the model has no such switch.
_HARMLESS_AT = {"learned_embeddings": True, "scale_embeddings": False}


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """What OPT adds.

    Attributes:
      norm_before: norms stand before attention and MLP, not behind each residual sum (OPT-350m).
      final_norm: whether there is a norm behind the last layer.
      bias: whether linear layers have biases.
      affine_norms: whether norms have scale and offset.
    """

    norm_before: bool
    final_norm: bool
    bias: bool
    affine_norms: bool

    @property
    def projected(self) -> bool:
        """Whether embeddings have another width than the model."""
        return self.d_embed != self.d_model

    @classmethod
    def read(cls, hf: Mapping[str, object], *, file: str) -> Config:
        """Reads a normalized config.json.

        Raises:
          ConfigError: a setting that is malformed, contradictory, unknown or not supported.
        """
        reader = Reader(canonicalize(hf, synonyms={}, defaults=_DEFAULTS, file=file), file)
        size = head_dim(reader, "hidden_size", "num_attention_heads")
        heads = reader.integer("num_attention_heads")
        before = reader.flag("do_layer_norm_before")
        config = cls(
            model_type="opt",
            d_model=heads * size,
            layers=reader.integer("num_hidden_layers", high=MAX_LAYERS),
            n_heads=heads,
            n_kv_heads=heads,
            head_dim=size,
            d_embed=reader.integer("word_embed_proj_dim", heads * size, high=MAX_WIDTH),
            d_ff=reader.integer("ffn_dim", high=MAX_WIDTH),
            vocab_size=reader.integer("vocab_size", high=MAX_VOCABULARY),
            max_positions=reader.integer("max_position_embeddings"),
            norm_eps=_NORM_EPS,
            activation=reader.choice("activation_function", ACTIVATIONS),
            tie_word_embeddings=reader.flag("tie_word_embeddings"),
            rope=None,
            norm_before=before,
            final_norm=not reader.flag("_remove_final_layer_norm") and before,
            bias=reader.flag("enable_bias"),
            affine_norms=reader.flag("layer_norm_elementwise_affine"),
        )
        reader.refuse_rest(_HARMLESS, _HARMLESS_AT)
        return config


def parameters(config: Config, shards: int, transposed_linear: bool) -> list[ParamSpec]:
    """Every parameter of a model with this config, over so many shards."""
    declare = Declaration(config.axis_sizes(shards), transposed_linear)
    specs = [
        declare.parameter("embedding_shard/~/linear", "w", "V e", "V"),
        learned_positions(declare),
    ]
    if config.projected:
        specs.append(declare.matrix("embedding_shard", "project_in", "e", "d", split="d"))
        specs.append(declare.matrix("projection_shard", "project_out", "d", "e", split="e"))
    for i in range(config.layers):
        specs += _layer_parameters(declare, config, f"layer_{i}/~/")
    if config.final_norm and config.affine_norms:
        specs += declare.layer_norm("projection_shard/~/replicated_layer_norm")
    if not config.tie_word_embeddings:
        specs += declare.linear("projection_shard/~/linear", "e", "V", split="V", bias=False)
    return specs


def _layer_parameters(declare: Declaration, config: Config, layer: str) -> list[ParamSpec]:
    norms = []
    if config.affine_norms:
        norms += declare.layer_norm(layer + "replicated_layer_norm")
        norms += declare.layer_norm(layer + "replicated_layer_norm_1")
    return [
        *norms,
        *attention_parameters(declare, layer, bias=config.bias, out_bias=config.bias),
        *mlp_parameters(declare, layer, bias=config.bias),
    ]


class ProjectedEmbedding(PositionedEmbedding):
    """Tokens brought from e to d, then positions added."""

    def at(self, ids: jax.Array, positions: jax.Array) -> jax.Array:
        """As in the base class: int32 [b, t] and int32 [b or 1, t] to [b, t, d]."""
        tokens = self(ids)  # [b, t, e]
        columns = self.matrix("project_in", tokens)  # float32 [b, t, d/n]
        columns = columns + self.position_columns(positions)
        return gather_columns(columns.astype(tokens.dtype))


class ProjectedProjection(Projection):
    """Brings the stream from d to e, then gives the logits."""

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., d] -> float32 [..., V/n]
        """The logits, those of the padding included."""
        columns = self.matrix("project_out", self.norm(x))  # float32 [..., e/n]
        return self.logits(gather_columns(columns.astype(x.dtype)))


class PostNormLayer(pre_norm.Layer):
    """The norms stand behind the residual sums."""

    def __call__(
        self, x: jax.Array, span: Span, memory: KVCache | None
    ) -> tuple[jax.Array, KVCache]:  # [b, t, d] -> [b, t, d]
        """The residual stream after this layer, and the keys and values it attended to."""
        attention, memory = self.attention(x, span, memory)
        x = self.attention_norm(add_residual(x, sum_over_shards(attention)))
        change = sum_over_shards(self.feed_forward(x))
        return self.feed_forward_norm(add_residual(x, change)), memory


def _no_norm(name: str) -> Callable[[jax.Array], jax.Array]:
    return lambda x: x


class Transformer(CausalTransformer):
    """OPT."""

    def __init__(self, config: Config, declared: Declared) -> None:
        super().__init__(name=NAME)
        self.rope = config.rope
        embedding_type, projection_type = PositionedEmbedding, Projection
        if config.projected:
            embedding_type, projection_type = ProjectedEmbedding, ProjectedProjection
        embedding = embedding_type(declared, name="embedding_shard")
        self.embedding, self._tokens_at = embedding, embedding.at
        size, norm = config.head_dim, partial(LayerNorm, declared, config.norm_eps)
        layer = partial(
            pre_norm.Layer if config.norm_before else PostNormLayer,
            norm=norm,
            attention=partial(Attention, declared, head_dim=size, scale=size**-0.5),
            feed_forward=partial(MLP, declared, config.activation),
        )
        self.layers = [layer(name=f"layer_{i}") for i in range(config.layers)]
        self.projection = projection_type(
            declared,
            norm=norm if config.final_norm else _no_norm,
            tied_to=embedding if config.tie_word_embeddings else None,
            name="projection_shard",
        )

    def embed(self, ids: jax.Array, span: Span) -> jax.Array:  # int32 [b, t] -> [b, t, d]
        """Tokens and positions."""
        return self._tokens_at(ids, span.positions)
