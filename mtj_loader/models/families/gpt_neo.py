"""GPT-Neo (Black et al., 2021): learned positions; layers that see all tokens or the last ones.

Its scores are not scaled by the size of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from mtj_loader.models.config import MAX_LAYERS, ConfigReader, ModelConfig
from mtj_loader.models.decoder import CausalTransformer
from mtj_loader.models.layers.attention import Attention
from mtj_loader.models.layers.embeddings import PositionedEmbedding
from mtj_loader.models.layers.feed_forward import MLP
from mtj_loader.models.layers.norms import LayerNorm
from mtj_loader.models.parameter_table import ParameterBuilder

_DEFAULT_TYPES = [[["global", "local"], 12]]  # of attention_types


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """What GPT-Neo adds.

    Attributes:
      windows: how many last positions each layer sees; None for all.
    """

    model_type = "gpt_neo"
    spellings: ClassVar = {
        "hidden_act": ("activation_function",),
        "norm_eps": ("layer_norm_epsilon",),
        "num_attention_heads": ("num_heads", "num_attention_heads"),
        "num_hidden_layers": ("num_layers", "num_hidden_layers"),
    }
    defaults: ClassVar = {  # of transformers' GPTNeoConfig
        "hidden_act": "gelu_new",
        "hidden_size": 2048,
        "intermediate_size": None,
        "max_position_embeddings": 2048,
        "norm_eps": 1e-5,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "tie_word_embeddings": True,
        "vocab_size": 50257,
        "window_size": 256,
    }
    ignored_keys = (  # dropout, and classification heads
        "resid_dropout", "summary_activation", "summary_proj_to_labels", "summary_type",
        "summary_use_proj",
    )  # fmt: skip

    windows: tuple[int | None, ...]

    @classmethod
    def read_own(cls, reader: ConfigReader, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the window of every local layer."""
        window, layers = reader.integer("window_size"), shared["layers"]
        kinds = _layer_kinds(reader)
        if len(kinds) != layers:
            found = f"attention types for {len(kinds)} layers, and there are {layers}"
            raise reader.error(found, "attention_types", f"types for {layers} layers")
        return {"windows": tuple(window if kind == "local" else None for kind in kinds)}


def _layer_kinds(reader: ConfigReader) -> list[str]:
    """Every layer's kind, from `attention_types`, from the list that it expands to, or from both.

    Raises:
      ConfigError: they are malformed, or disagree.
    """
    types, listed = reader.raw("attention_types"), reader.raw("attention_layers")
    if types in (None, _DEFAULT_TYPES):  # transformers saves the default beside any list
        types = _DEFAULT_TYPES if listed is None else [[listed, 1]]
    kinds = _expand_types(reader, types)
    if listed not in (None, kinds):
        what = "two spellings of one setting disagree"
        raise reader.error(what, "attention_layers", "what attention_types expands to")
    return kinds


def _expand_types(reader: ConfigReader, types: object) -> list[str]:
    """Expands `[[["global", "local"], 12]]` into 24 names."""
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


def make_model(config: Config, params: ParameterBuilder) -> CausalTransformer:
    """GPT-Neo."""
    return CausalTransformer(
        config,
        params,
        norm=partial(LayerNorm, params, config.norm_eps),
        attention=lambda layer: Attention(
            params, bias=False, out_bias=True, scale=1.0, window=config.windows[layer]
        ),
        feed_forward=partial(MLP, params, config.activation),
        embedding=PositionedEmbedding,
    )
