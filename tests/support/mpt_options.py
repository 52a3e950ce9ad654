"""MPT configs with the options that transformers ignores."""

from __future__ import annotations

from typing import Any

ATTENTION: dict[str, Any] = {
    "alibi": True,
    "alibi_bias_max": 8,
    "clip_qkv": None,
    "qk_ln": False,
    "softmax_scale": None,
}
CONFIG: dict[str, Any] = {
    "model_type": "mpt",
    "d_model": 24,
    "expansion_ratio": 4,
    "layer_norm_epsilon": 1e-5,
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 20,
    "n_heads": 6,
    "n_layers": 2,
    "no_bias": True,
    "vocab_size": 61,
}


def config(attention: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    return {**CONFIG, **settings, "attn_config": {**ATTENTION, **(attention or {})}}


MPT_OPTIONS: dict[str, dict[str, Any]] = {
    "steep_alibi": config({"alibi_bias_max": 4}),
    "steep_alibi_of_eight_heads": config({"alibi_bias_max": 16}, n_heads=8),
    "qk_ln": config({"qk_ln": True, "clip_qkv": 0.9}),
    "qk_ln_with_biases": config({"qk_ln": True}, no_bias=False, layer_norm_epsilon=3e-4),
    "learned_positions": config({"alibi": False}, n_heads=8),
    "no_positions": config({"alibi": False}, learned_pos_emb=False, n_heads=4),
    "biases": config({"softmax_scale": 0.4, "clip_qkv": 0.5}, no_bias=False, n_heads=12),
    "narrow": config(expansion_ratio=2.5, logit_scale=0.3),
    "scaled_logits": config(logit_scale="inv_sqrt_d_model", n_heads=2),
}
