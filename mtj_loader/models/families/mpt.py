"""MPT (MosaicML, 2023), with the options of mosaicml/llm-foundry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from mtj_loader.formats.known_settings import reads
from mtj_loader.models.config import MAX_WIDTH, ConfigReader, ModelConfig
from mtj_loader.models.decoder import CausalTransformer
from mtj_loader.models.layers.alibi import alibi, mpt_slopes
from mtj_loader.models.layers.attention import FusedAttention
from mtj_loader.models.layers.embeddings import Embedding, PositionedEmbedding, Projection
from mtj_loader.models.layers.feed_forward import MLP
from mtj_loader.models.layers.norms import AllHeadsLayerNorm, LayerNorm
from mtj_loader.models.parameter_table import ParameterBuilder

_NORMS = ("low_precision_layernorm", "layernorm")  # float32 in both: it is at least as precise

# Of `attn_config`.
_ATTENTION_IGNORED = ("attn_impl", "rope_dail_config", "rope_hf_config", "rope_impl", "rope_theta")
_ATTENTION_SUPPORTED = {
    "attn_logit_softcapping": None, "attn_type": "multihead_attention",
    "attn_uses_sequence_id": False, "fc_type": "torch", "prefix_lm": False, "qk_gn": False,
    "rope": False, "sliding_window_size": -1,
}  # fmt: skip


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

    model_type = "mpt"
    spellings: ClassVar = {
        "hidden_act": (),
        "hidden_size": ("d_model", "hidden_size"),
        "intermediate_size": (),
        "max_position_embeddings": ("max_seq_len",),
        "norm_eps": ("layer_norm_epsilon",),
        "num_attention_heads": ("n_heads", "num_attention_heads"),
        "num_hidden_layers": ("n_layers", "num_hidden_layers"),
    }
    defaults: ClassVar = {  # of transformers' MptConfig and MptAttentionConfig
        "expansion_ratio": 4,
        "hidden_act": "gelu",
        "hidden_size": 2048,
        "intermediate_size": None,
        "learned_pos_emb": True,
        "max_position_embeddings": 2048,
        "no_bias": True,
        "norm_eps": 1e-5,
        "norm_type": "low_precision_layernorm",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "tie_word_embeddings": True,
        "vocab_size": 50368,
    }
    ignored_keys = ("emb_pdrop", "embedding_fraction", "init_device")

    bias: bool
    learned_positions: bool
    alibi_bias_max: float | None
    clip_qkv: float | None
    qk_norm: bool
    softmax_scale: float
    logit_scale: float

    @classmethod
    def read_own(cls, reader: ConfigReader, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the attributes above, and the width of the feed-forward layer."""
        width = shared["d_model"]
        attention = _read_attention(reader, shared)
        reader.choice("norm_type", _NORMS)
        _check_feed_forward(reader.section("ffn_config"))
        learned = reader.flag("learned_pos_emb") and attention["alibi_bias_max"] is None
        inverse_root = reader.raw("logit_scale") == "inv_sqrt_d_model"
        return {
            "d_ff": _read_d_ff(reader, width),
            "bias": not reader.flag("no_bias"),
            "learned_positions": learned,
            "logit_scale": width**-0.5 if inverse_root else reader.number("logit_scale", 1.0),
            **attention,
        }

    def supported_values(self) -> Mapping[str, object]:
        """Options of llm-foundry that only other models use."""
        return {"fc_type": "torch", "verbose": 0}


def _read_attention(reader: ConfigReader, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Reads `attn_config`."""
    attention = reader.section("attn_config")
    with_alibi, bias_max = attention.flag("alibi", True), attention.number("alibi_bias_max", 8)
    own = {
        "alibi_bias_max": bias_max if with_alibi else None,
        "clip_qkv": attention.number("clip_qkv", 0) or None,  # 0 means no bound there, too
        "qk_norm": attention.flag("qk_ln", False),
        "softmax_scale": attention.number("softmax_scale", shared["head_dim"] ** -0.5),
    }
    kv_heads: dict[str, object] = {"kv_n_heads": shared["n_heads"]}
    attention.refuse_unsupported(
        lambda key: reads("mpt", f"attn_config.{key}"),
        _ATTENTION_IGNORED,
        _ATTENTION_SUPPORTED | kv_heads,
    )
    return own


def _check_feed_forward(options: ConfigReader) -> None:
    """Refuses llm-foundry's options of the feed-forward layer, which transformers does not have."""
    options.choice("ffn_type", ["mptmlp"], "mptmlp")
    options.choice("fc_type", ["torch"], "torch")
    options.refuse_unsupported(matters=lambda key: True)


def _read_d_ff(reader: ConfigReader, width: int) -> int:
    ratio = reader.number("expansion_ratio")
    if not 1 <= ratio * width <= MAX_WIDTH or ratio * width % 1:
        what = "not the width of a feed-forward layer"
        expected = f"a whole number when multiplied by {width}"
        reader.refuse(what, "expansion_ratio", expected, given=["hidden_size"])
        return width
    return int(ratio * width)


def make_model(config: Config, params: ParameterBuilder) -> CausalTransformer:
    """MPT."""
    bias, qk_norm, score_bias = config.bias, None, None
    if config.qk_norm:
        qk_norm = partial(AllHeadsLayerNorm, params, config.norm_eps, offset=bias)
    if config.alibi_bias_max is not None:
        score_bias = partial(alibi, mpt_slopes(config.n_heads, config.alibi_bias_max))
    return CausalTransformer(
        config,
        params,
        norm=partial(LayerNorm, params, config.norm_eps, offset=bias),
        attention=lambda layer: FusedAttention(
            params,
            bias=bias,
            scale=config.softmax_scale,
            clip=config.clip_qkv,
            q_norm=qk_norm,
            k_norm=qk_norm,
            score_bias=score_bias,
        ),
        feed_forward=partial(MLP, params, config.activation, bias=bias),
        embedding=PositionedEmbedding if config.learned_positions else Embedding,
        projection=partial(Projection, scale=config.logit_scale),
    )
