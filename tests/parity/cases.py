"""Tiny configs of every family, chosen so that mistakes cannot cancel out.

A case is a config.json without `model_type`; settings are spelled as transformers writes them, as
in old files, or left out. No two dimensions of a case are equal, and the cases of a family cover
every shard count from 1 to 8 that its heads allow. Used live (`make parity`), and by
tests/oracle to write tests/data/families.
"""

from __future__ import annotations

from typing import Any

from tests.parity.decoder_cases import LLAMA, MISTRAL, MIXTRAL, MPT, QWEN3
from tests.parity.llama_like_cases import GEMMA2, GEMMA3_TEXT, PHI3, QWEN2, STABLELM

Settings = dict[str, Any]

GPTJ: dict[str, Settings] = {
    # Every setting, in the names of the family.
    "published": {
        "n_embd": 42,
        "n_head": 6,
        "n_layer": 2,
        "n_inner": 60,
        "n_positions": 40,
        "rotary_dim": 4,
        "rotary": True,
        "scale_attn_weights": True,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 3e-4,
        "tie_word_embeddings": False,
        "vocab_size": 61,
    },
    # The usual names; the default width of the MLP; whole heads are rotated.
    "default_inner": {
        "hidden_size": 24,
        "num_attention_heads": 12,
        "num_hidden_layers": 2,
        "max_position_embeddings": 36,
        "n_inner": None,
        "rotary_dim": 2,
        "activation_function": "gelu",
        "vocab_size": 53,
    },
    "tied": {
        "n_embd": 32,
        "n_head": 8,
        "n_layer": 3,
        "n_inner": 40,
        "n_positions": 44,
        "rotary_dim": 2,
        "activation_function": "silu",
        "tie_word_embeddings": True,
        "vocab_size": 67,
    },
}

GPT_NEO: dict[str, Settings] = {
    "global_local": {
        "hidden_size": 42,
        "num_heads": 6,
        "num_layers": 2,
        "intermediate_size": 60,
        "max_position_embeddings": 40,
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
        "window_size": 5,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 3e-4,
        "vocab_size": 61,
    },
    "local_first": {
        "hidden_size": 24,
        "num_attention_heads": 12,
        "num_hidden_layers": 3,
        "intermediate_size": None,
        "max_position_embeddings": 36,
        "attention_types": [[["local"], 2], [["global"], 1]],
        "window_size": 1,
        "activation_function": "relu",
        "vocab_size": 53,
    },
    # A window wider than any row; the list alone, as it would be after the expansion.
    "untied": {
        "hidden_size": 32,
        "num_heads": 8,
        "num_layers": 2,
        "intermediate_size": 40,
        "max_position_embeddings": 44,
        "attention_types": None,
        "attention_layers": ["local", "local"],
        "tie_word_embeddings": False,
        "vocab_size": 67,
    },
}

OPT: dict[str, Settings] = {
    "pre_norm": {
        "hidden_size": 42,
        "num_attention_heads": 6,
        "num_hidden_layers": 2,
        "ffn_dim": 60,
        "max_position_embeddings": 40,
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "vocab_size": 61,
        "prefix": "</s>",
    },
    # OPT-350m: norms after the sums, no final norm, embeddings of another width.
    "opt_350m": {
        "hidden_size": 36,
        "word_embed_proj_dim": 24,
        "num_attention_heads": 12,
        "num_hidden_layers": 2,
        "ffn_dim": 48,
        "max_position_embeddings": 44,
        "do_layer_norm_before": False,
        "vocab_size": 53,
    },
    "galactica": {
        "hidden_size": 32,
        "num_attention_heads": 8,
        "num_hidden_layers": 3,
        "ffn_dim": 40,
        "max_position_embeddings": 36,
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "activation_function": "gelu",
        "learned_embeddings": True,
        "scale_embeddings": False,
        "vocab_size": 67,
    },
    "no_final_norm": {
        "hidden_size": 40,
        "num_attention_heads": 5,
        "num_hidden_layers": 2,
        "ffn_dim": 50,
        "max_position_embeddings": 40,
        "_remove_final_layer_norm": True,
        "activation_function": "gelu_new",
        "vocab_size": 59,
    },
    # Projections and a final norm; the embedding is wider than the model.
    "projected_untied": {
        "hidden_size": 24,
        "word_embed_proj_dim": 40,
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
        "ffn_dim": 56,
        "max_position_embeddings": 36,
        "tie_word_embeddings": False,
        "vocab_size": 61,
    },
    "post_norm_unbiased": {
        "hidden_size": 24,
        "num_attention_heads": 6,
        "num_hidden_layers": 2,
        "ffn_dim": 42,
        "max_position_embeddings": 36,
        "do_layer_norm_before": False,
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "vocab_size": 61,
    },
}

XGLM: dict[str, Settings] = {
    "scaled": {
        "d_model": 42,
        "attention_heads": 6,
        "num_layers": 2,
        "ffn_dim": 60,
        "max_position_embeddings": 40,
        "scale_embedding": True,
        "activation_function": "gelu",
        "pad_token_id": 1,
        "vocab_size": 61,
    },
    # The zero row of the padding token is that of position 5.
    "padding_in_sight": {
        "hidden_size": 24,
        "num_attention_heads": 12,
        "num_hidden_layers": 2,
        "ffn_dim": 36,
        "max_position_embeddings": 44,
        "scale_embedding": False,
        "activation_function": "relu",
        "pad_token_id": 7,
        "vocab_size": 53,
    },
    "untied": {
        "d_model": 32,
        "attention_heads": 8,
        "num_layers": 3,
        "ffn_dim": 40,
        "max_position_embeddings": 36,
        "tie_word_embeddings": False,
        "vocab_size": 67,
    },
    # Sines and cosines do not fill the width.
    "odd_width": {
        "d_model": 35,
        "attention_heads": 5,
        "num_layers": 2,
        "ffn_dim": 30,
        "max_position_embeddings": 40,
        "pad_token_id": 2,
        "vocab_size": 59,
    },
}

BLOOM: dict[str, Settings] = {
    # The spelling of the first published files.
    "published": {
        "n_embed": 24,
        "num_attention_heads": 6,
        "n_layer": 2,
        "n_inner": None,
        "layer_norm_epsilon": 3e-4,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "masked_softmax_fusion": True,
        "offset_alibi": 100,
        "pretraining_tp": 2,
        "skip_bias_add": True,
        "skip_bias_add_qkv": False,
        "slow_but_exact": False,
        "seq_length": 40,
        "vocab_size": 61,
    },
    "residual_after_norm": {
        "hidden_size": 36,
        "n_head": 12,
        "n_layer": 1,
        "apply_residual_connection_post_layernorm": True,
        "vocab_size": 53,
    },
    "untied": {
        "hidden_size": 24,
        "n_head": 8,
        "num_hidden_layers": 3,
        "tie_word_embeddings": False,
        "vocab_size": 67,
    },
    "five_heads": {
        "hidden_size": 30,
        "n_head": 5,
        "n_layer": 2,
        "apply_residual_connection_post_layernorm": True,
        "vocab_size": 59,
    },
}

CASES: dict[str, dict[str, Settings]] = {
    "gptj": GPTJ,
    "gpt_neo": GPT_NEO,
    "opt": OPT,
    "xglm": XGLM,
    "bloom": BLOOM,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "mpt": MPT,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3_TEXT,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "stablelm": STABLELM,
}
NAMES = [(family, name) for family, cases in CASES.items() for name in cases]


def config_json(family: str, name: str) -> Settings:
    """The config.json of a case; no token ends a text, so that texts have the length asked for."""
    return {"model_type": family, "eos_token_id": None, **CASES[family][name]}
