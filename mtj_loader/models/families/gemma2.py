"""Gemma 2 (Gemma Team, 2024, arXiv:2408.00118): four norms a layer, soft caps, windows by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from mtj_loader.models.config import ConfigReader
from mtj_loader.models.decoder import CausalTransformer, SandwichLayer
from mtj_loader.models.layers.embeddings import Embedding, Projection
from mtj_loader.models.layers.norms import RMSNorm
from mtj_loader.models.llama_like import (
    LlamaLikeConfig,
    Windows,
    make_llama_like,
    windows_by_layer,
)
from mtj_loader.models.parameter_table import ParameterBuilder


@dataclass(frozen=True, kw_only=True)
class Config(LlamaLikeConfig):
    """What Gemma 2 adds.

    Attributes:
      score_scale: of the attention scores.
      score_cap, logit_cap: soft bounds of attention scores and logits; None for no bound.
    """

    model_type = "gemma2"
    spellings: ClassVar = {"hidden_act": ("hidden_activation",), "norm_eps": ("rms_norm_eps",)}
    defaults: ClassVar = {  # of transformers' Gemma2Config
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "norm_eps": 1e-6,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "vocab_size": 256000,
    }

    score_scale: float
    score_cap: float | None
    logit_cap: float | None

    @classmethod
    def read_own(cls, reader: ConfigReader, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the attributes above."""
        return {
            **super().read_own(reader, shared),
            "score_scale": reader.integer("query_pre_attn_scalar") ** -0.5,
            "score_cap": _read_cap(reader, "attn_logit_softcapping"),
            "logit_cap": _read_cap(reader, "final_logit_softcapping"),
        }

    @classmethod
    def read_windows(cls, reader: ConfigReader, layers: int) -> Windows:
        """Reads the windows; without `layer_types`, every second layer has one, from the first."""
        return windows_by_layer(reader, layers, cls.read_window(reader), lambda i: i % 2 == 0)

    def supported_values(self) -> Mapping[str, object]:
        """Only causal attention."""
        return {"use_bidirectional_attention": False}


def _read_cap(reader: ConfigReader, key: str) -> float | None:
    cap = reader.number(key) if reader.has(key) else None
    if cap == 0:
        reader.refuse("not a legal value", key, "a number above 0")
    return cap


def make_model(
    config: Config,
    params: ParameterBuilder,
    **attention: Any,  # noqa: ANN401
) -> CausalTransformer:
    """Gemma 2, with other options of the attention for its successors."""
    return make_llama_like(
        config,
        params,
        norm=partial(RMSNorm, params, config.norm_eps, unit_offset=True),
        attention={"scale": config.score_scale, "cap": config.score_cap, **attention},
        layer=SandwichLayer,
        embedding=partial(Embedding, scale=config.d_model**0.5),
        projection=partial(Projection, cap=config.logit_cap),
    )
