"""OPT (Zhang et al., 2022, arXiv:2205.01068) and Galactica (Taylor et al., 2022, arXiv:2211.09085).

n shards   d model   e embedding   b batch   t time
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax

from mtj_loader.models.config import MAX_WIDTH, ConfigReader, ModelConfig
from mtj_loader.models.decoder import CausalTransformer, Layer
from mtj_loader.models.layers.attention import Attention, KVCache
from mtj_loader.models.layers.embeddings import PositionedEmbedding, Projection
from mtj_loader.models.layers.feed_forward import MLP
from mtj_loader.models.layers.linears import add_residual, gather_columns, sum_over_shards
from mtj_loader.models.layers.norms import LayerNorm
from mtj_loader.models.layers.positions import Positions
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
    ignored_keys = ("activation_dropout",)

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


class ProjectedEmbedding(PositionedEmbedding):
    """Tokens projected from e to d, plus positions."""

    def __init__(self, params: ParameterBuilder, name: str) -> None:
        super().__init__(params, name)
        self.declare_matrix("project_in", ins="e", outs="d", split="d")

    def __call__(self, ids: jax.Array, positions: Positions) -> jax.Array:  # [b, t, d]
        """The projected tokens plus their positions."""
        tokens = self.tokens(ids)  # [b, t, e]
        columns = self.matmul(tokens, "project_in")  # float32 [b, t, d/n]
        columns = columns + self.position_columns(positions)
        return gather_columns(columns.astype(tokens.dtype))


class ProjectedProjection(Projection):
    """Projects the stream from d to e before the logits."""

    def __init__(self, params: ParameterBuilder, **options: Any) -> None:  # noqa: ANN401
        super().__init__(params, **options)
        self.declare_matrix("project_out", ins="d", outs="e", split="e")

    def before_logits(self, x: jax.Array) -> jax.Array:  # [..., d] -> [..., e]
        """The input of the projection."""
        columns = self.matmul(x, "project_out")  # float32 [..., e/n]
        return gather_columns(columns.astype(x.dtype))


class PostNormLayer(Layer):
    """A layer whose norms follow the residual sums."""

    def __call__(
        self, x: jax.Array, positions: Positions, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache]:  # [b, t, d] -> [b, t, d]
        """The residual stream after this layer, and the keys and values it attended to."""
        attention, cache = self.attention(x, positions, cache)
        x = self.attention_norm(add_residual(x, sum_over_shards(attention)))
        change = sum_over_shards(self.feed_forward(x))
        return self.feed_forward_norm(add_residual(x, change)), cache


def make_model(config: Config, params: ParameterBuilder) -> CausalTransformer:
    """OPT."""
    affine = config.affine_norms
    norm = partial(LayerNorm, params, config.norm_eps, scale=affine, offset=affine)

    def attention(index: int) -> Attention:
        return Attention(params, head_dim=config.head_dim, bias=config.bias, out_bias=config.bias)

    projected = config.d_embed != config.d_model
    return CausalTransformer(
        config,
        params,
        norm=norm if config.final_norm else None,
        layer=partial(
            Layer if config.norm_before else PostNormLayer,
            norm=norm,
            attention=attention,
            feed_forward=lambda index: MLP(params, config.activation, bias=config.bias),
        ),
        embedding=ProjectedEmbedding if projected else PositionedEmbedding,
        projection=ProjectedProjection if projected else Projection,
    )
