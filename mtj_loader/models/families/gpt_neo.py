"""GPT-Neo (Black et al., 2021): learned positions, and layers that see all or the last tokens.

Its scores are not scaled by the size of a head.

  n shards   d model   f feed-forward   V padded vocabulary   h heads   k head_dim   p positions
  b batch   t time
"""

from __future__ import annotations

from collections.abc import Mapping
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
from mtj_loader.models.layers.attention import Span
from mtj_loader.models.layers.blocks import MLP, Attention, attention_parameters, mlp_parameters
from mtj_loader.models.layers.parts import LayerNorm, Projection
from mtj_loader.models.layers.positions import PositionedEmbedding, learned_positions
from mtj_loader.models.parameter_table import Declaration, Declared
from mtj_loader.parameters import ParamSpec

# transformers' GPTNeoConfig
_SYNONYMS = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}
_DEFAULTS: dict[str, object] = {
    "activation_function": "gelu_new",
    "hidden_size": 2048,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 2048,
    "num_heads": 16,
    "num_layers": 24,
    "tie_word_embeddings": True,
    "vocab_size": 50257,
    "window_size": 256,
}
_DEFAULT_TYPES = [[["global", "local"], 12]]  # of attention_types
# Dropout, and classification heads.
_HARMLESS = (
    "resid_dropout", "summary_activation", "summary_proj_to_labels", "summary_type",
    "summary_use_proj",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """What GPT-Neo adds.

    Attributes:
      windows: for every layer the number of last positions that it sees; None means all.
    """

    windows: tuple[int | None, ...]

    @classmethod
    def read(cls, hf: Mapping[str, object], *, file: str) -> Config:
        """Reads a normalized config.json.

        Raises:
          ConfigError: a setting that is malformed, contradictory, unknown or not supported.
        """
        full = canonicalize(hf, synonyms=_SYNONYMS, defaults=_DEFAULTS, file=file)
        reader = Reader(full, file)
        size = head_dim(reader, "hidden_size", "num_heads")
        heads = reader.integer("num_heads")
        layers = reader.integer("num_layers", high=MAX_LAYERS)
        config = cls(
            model_type="gpt_neo",
            d_model=heads * size,
            layers=layers,
            n_heads=heads,
            n_kv_heads=heads,
            head_dim=size,
            d_embed=heads * size,
            d_ff=reader.integer("intermediate_size", 4 * heads * size, high=MAX_WIDTH),
            vocab_size=reader.integer("vocab_size", high=MAX_VOCABULARY),
            max_positions=reader.integer("max_position_embeddings"),
            norm_eps=reader.number("layer_norm_epsilon"),
            activation=reader.choice("activation_function", ACTIVATIONS),
            tie_word_embeddings=reader.flag("tie_word_embeddings"),
            rope=None,
            windows=_windows(reader, layers),
        )
        reader.refuse_rest(_HARMLESS)
        return config


def _windows(reader: Reader, layers: int) -> tuple[int | None, ...]:
    """The window of every layer that is local."""
    window = reader.integer("window_size")
    kinds = _kinds(reader)
    if len(kinds) != layers:
        found = f"attention types for {len(kinds)} layers, and there are {layers}"
        raise reader.error(found, "attention_types", f"types for {layers} layers")
    return tuple(window if kind == "local" else None for kind in kinds)


def _kinds(reader: Reader) -> list[str]:
    """Every layer's kind, from `attention_types`, from the list that it expands to, or from both.

    Raises:
      ConfigError: they are malformed, or disagree.
    """
    types, listed = reader.raw("attention_types"), reader.raw("attention_layers")
    if types in (None, _DEFAULT_TYPES):  # transformers saves the default beside any list
        types = _DEFAULT_TYPES if listed is None else [[listed, 1]]
    kinds = _expanded(reader, types)
    if listed not in (None, kinds):
        what = "two spellings of one setting disagree"
        raise reader.error(what, "attention_layers", "what attention_types expands to")
    return kinds


def _expanded(reader: Reader, types: object) -> list[str]:
    """`[[["global", "local"], 12]]` spelled out."""
    kinds: list[str] = []
    for item in types if isinstance(types, list) else [types]:
        match item:
            case [list(names), int(times)] if times <= MAX_LAYERS:
                kinds += names * times
            case _:
                expected = "a list of [[kind, …], times]"
                raise reader.error("not a legal value", "attention_types", expected)
    if not set(map(str, kinds)) <= {"global", "local"}:
        what = "an attention type that is not supported"
        raise reader.error(what, "attention_types", '"global" or "local"')
    return kinds


def parameters(config: Config, shards: int, transposed_linear: bool) -> list[ParamSpec]:
    """Every parameter of a model with this config, over so many shards."""
    declare = Declaration(config.axis_sizes(shards), transposed_linear)

    def layer(path: str) -> list[ParamSpec]:
        attention = attention_parameters(declare, path, bias=False, out_bias=True)
        return [*attention, *mlp_parameters(declare, path, bias=True)]

    specs = pre_norm.parameters(config, declare, layer, declare.layer_norm)
    return [*specs, learned_positions(declare)]


class Transformer(CausalTransformer):
    """GPT-Neo."""

    def __init__(self, config: Config, declared: Declared) -> None:
        super().__init__(name=NAME)
        self.rope = config.rope
        embedding = PositionedEmbedding(declared, name="embedding_shard")
        self.embedding, self._tokens_at = embedding, embedding.at
        norm = partial(LayerNorm, declared, config.norm_eps)
        attention = partial(Attention, declared, head_dim=config.head_dim, scale=1.0)
        mlp = partial(MLP, declared, config.activation)
        layer = partial(pre_norm.Layer, norm=norm, feed_forward=mlp)
        self.layers = [
            layer(attention=partial(attention, window=window), name=f"layer_{i}")
            for i, window in enumerate(config.windows)
        ]
        self.projection = Projection(
            declared,
            norm=norm,
            tied_to=embedding if config.tie_word_embeddings else None,
            name="projection_shard",
        )

    def embed(self, ids: jax.Array, span: Span) -> jax.Array:  # int32 [b, t] -> [b, t, d]
        """Tokens and positions."""
        return self._tokens_at(ids, span.positions)
