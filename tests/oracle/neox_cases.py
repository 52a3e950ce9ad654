"""Tiny GPT-NeoX configs that cover every setting whose error could go unnoticed.

No two dimensions of a case are equal. About half use the keys of old config.json files
(rotary_pct, rotary_emb_base, rope_scaling, torch_dtype), the rest the keys of transformers 5.
"""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "max_position_embeddings": 64,
    "num_hidden_layers": 2,
}


def _six_heads(**settings: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 60, "vocab_size": 61}
    return {**_COMMON, **sizes, **settings}


def _twelve_heads(**settings: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": 48,
        "num_attention_heads": 12,
        "intermediate_size": 84,
        "vocab_size": 67,
    }
    return {**_COMMON, **sizes, **settings}


def _eight_heads(**settings: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "num_attention_heads": 8, "intermediate_size": 40, "vocab_size": 53}
    return {**_COMMON, **sizes, **settings}


def _rope(**settings: Any) -> dict[str, Any]:
    """One layer, which is enough to show a difference in positions."""
    rope = {"rope_theta": 500.0, "partial_rotary_factor": 1.0, **settings}
    return {"num_hidden_layers": 1, "rope_parameters": rope}


CASES: dict[str, dict[str, Any]] = {
    # Exactly the keys of old files.
    "pythia_like": _six_heads(
        hidden_act="gelu",
        layer_norm_eps=1e-05,
        rotary_pct=0.25,
        rotary_emb_base=10000,
        tie_word_embeddings=False,
        torch_dtype="float32",
        use_parallel_residual=True,
    ),
    "neox_20b_like": _eight_heads(
        num_hidden_layers=3, hidden_act="gelu_fast", rotary_pct=0.5, rotary_emb_base=2500
    ),
    # An odd number of rotated dimensions (int(6 · 0.5) = 3) is rounded up to whole pairs.
    "odd_rotary": _eight_heads(
        hidden_size=48,
        hidden_act="quick_gelu",
        **_rope(partial_rotary_factor=0.5),
    ),
    "eps_and_theta": _twelve_heads(
        hidden_act="gelu_new", layer_norm_eps=3e-4, rotary_emb_base=123, rotary_pct=1.0
    ),
    "no_attention_bias": _six_heads(hidden_act="relu", attention_bias=False),
    "tied": _eight_heads(hidden_act="silu", tie_word_embeddings=True, rotary_pct=1.0),
    "serial": _twelve_heads(
        hidden_act="gelu_pytorch_tanh", use_parallel_residual=False, layer_norm_eps=3e-4
    ),
    "serial_tied_unbiased": _six_heads(
        use_parallel_residual=False,
        tie_word_embeddings=True,
        attention_bias=False,
        vocab_size=59,
        rotary_pct=0.5,
    ),
    "rope_linear": _six_heads(
        rotary_pct=0.75, rope_scaling={"type": "linear", "factor": 2.5}, use_parallel_residual=False
    ),
    # The rows of this case are longer than 24 tokens, so the frequencies change.
    "rope_dynamic": _eight_heads(
        max_position_embeddings=24, rotary_pct=1.0, rope_scaling={"type": "dynamic", "factor": 3.0}
    ),
    "rope_dynamic_short": _eight_heads(
        rotary_pct=1.0, rope_scaling={"rope_type": "dynamic", "factor": 3.0}
    ),
    "rope_yarn": _six_heads(
        **_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    ),
    "rope_yarn_all_settings": _six_heads(
        **_rope(
            rope_type="yarn",
            factor=3.0,
            original_max_position_embeddings=20,
            beta_fast=6.0,
            beta_slow=0.5,
            mscale=1.3,
            mscale_all_dim=0.7,
            truncate=False,
        )
    ),
    "rope_llama3": _twelve_heads(
        **_rope(
            rope_type="llama3",
            factor=5.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        )
    ),
    "rope_longrope": _six_heads(
        **_rope(
            rope_type="longrope",
            short_factor=[1.0, 1.1, 1.3, 1.7],
            long_factor=[1.5, 2.5, 4.0, 7.0],
            original_max_position_embeddings=16,
        )
    ),
    "rope_longrope_short": _six_heads(
        **_rope(
            rope_type="longrope",
            short_factor=[1.0, 1.1, 1.3, 1.7],
            long_factor=[1.5, 2.5, 4.0, 7.0],
            original_max_position_embeddings=48,
            factor=2.0,
        )
    ),
    "rope_proportional": _six_heads(
        **_rope(rope_type="proportional", partial_rotary_factor=0.5, factor=1.5)
    ),
}

# Cases for which the output of every module is written too.
WITH_MODULES = ("pythia_like", "serial_tied_unbiased", "eps_and_theta")
