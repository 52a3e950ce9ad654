"""GPT-Neo (Black et al., 2021): learned positions; layers that see all tokens or the last ones.

Its scores are not scaled by the size of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from mtj_loader.models.config import ConfigReader, ModelConfig
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

    windows: tuple[int | None, ...]

    @classmethod
    def read_own(cls, reader: ConfigReader, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the window of every local layer."""
        window = reader.integer("window_size")
        kinds = _layer_kinds(reader, shared["layers"])
        return {"windows": tuple(window if kind == "local" else None for kind in kinds)}

    def supported_values(self) -> Mapping[str, object]:
        """The first conversions of GPT-J call themselves GPT-Neo and set `rotary`."""
        return {"rotary": False}


def _layer_kinds(reader: ConfigReader, layers: int) -> list[str]:
    """Every layer's kind, from `attention_types`, from the list that it expands to, or from both.

    Refuses them if they are malformed or disagree.
    """
    types, listed = reader.raw("attention_types"), reader.raw("attention_layers")
    if types in (None, _DEFAULT_TYPES):  # transformers saves the default beside any list
        types = _DEFAULT_TYPES if listed is None else [[listed, 1]]
    kinds = _expand_types(reader, types, layers)
    if listed not in (None, kinds):
        what, expected = "two spellings of one setting disagree", "what attention_types expands to"
        reader.refuse(what, "attention_layers", expected, given=["attention_types"])
    return kinds


def _expand_types(reader: ConfigReader, types: object, layers: int) -> list[str]:
    """Expands `[[["global", "local"], 12]]` into 24 names, which are counted first."""
    items: list[Any] = types if isinstance(types, list) else [types]
    count, wrong = 0, None
    for item in items:
        match item:
            case [list(names), int(times)] if times >= 0:
                count += len(names) * times
                if not all(name in ("global", "local") for name in names):
                    wrong = "an attention type that is not supported", '"global" or "local"'
            case _:
                wrong = wrong or ("not a legal value", "a list of [[kind, …], times]")
    if wrong is None and count != layers:
        found = f"attention types for {count} layers, and there are {layers}"
        wrong = found, f"types for {layers} layers"
    if wrong is not None:
        reader.refuse(wrong[0], "attention_types", wrong[1], given=["num_hidden_layers"])
        return []
    return [name for names, times in items for _ in range(times) for name in names]


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
