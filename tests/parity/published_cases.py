"""Settings as published files combine them, with the sizes scaled down.

Facts about config.json files of many origins: conversions of the first models, files of every
transformers version, and the keys that other programs add. `model_type` is the part of the name
before the dash.
"""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]

_NEOX = {
    "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 56,
    "vocab_size": 61, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rotary_emb_base": 10000,
    "rotary_pct": 0.25, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "torch_dtype": "float16", "architectures": ["GPTNeoXForCausalLM"], "use_cache": True,
}  # fmt: skip
_GPTJ = {
    "n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 64, "rotary_dim": 8, "vocab_size": 61,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "summary_type": "cls_index",
    "tokenizer_class": "GPT2Tokenizer", "gradient_checkpointing": False,
}  # fmt: skip
_LLAMA = {
    "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 56,
    "vocab_size": 61, "hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "max_position_embeddings": 2048, "torch_dtype": "float16", "transformers_version": "4.28.1",
}  # fmt: skip
_GROUPED = _LLAMA | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
_LLAMA_3 = _GROUPED | {
    "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "rope_theta": 500000.0,
    "max_position_embeddings": 131072, "eos_token_id": [11, 18, 19],
    "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
}  # fmt: skip
_MISTRAL = _GROUPED | {"max_position_embeddings": 32768, "sliding_window": 5}
_MIXTRAL = _GROUPED | {
    "max_position_embeddings": 65536, "num_experts_per_tok": 2, "num_local_experts": 4,
    "output_router_logits": False, "rope_theta": 1000000, "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0, "sliding_window": None,
}  # fmt: skip
_QWEN3 = _GROUPED | {
    "attention_bias": False, "head_dim": 16, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "max_window_layers": 2, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "use_sliding_window": False,
}  # fmt: skip
_BLOOM = {
    "n_embed": 48, "n_layer": 2, "num_attention_heads": 4, "vocab_size": 61,
    "layer_norm_epsilon": 1e-5, "apply_residual_connection_post_layernorm": False,
    "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "masked_softmax_fusion": True,
    "offset_alibi": 100, "pretraining_tp": 4, "skip_bias_add": True, "skip_bias_add_qkv": False,
}  # fmt: skip
_OPT = {
    "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 56,
    "vocab_size": 61, "max_position_embeddings": 64, "activation_function": "relu",
    "do_layer_norm_before": True, "word_embed_proj_dim": 48, "prefix": "</s>", "layerdrop": 0.0,
}  # fmt: skip
_MPT = {
    "d_model": 48, "n_heads": 4, "n_layers": 2, "vocab_size": 61, "max_seq_len": 64,
    "expansion_ratio": 4, "learned_pos_emb": True, "logit_scale": None, "no_bias": True,
    "norm_type": "low_precision_layernorm", "init_device": "cpu", "embedding_fraction": 1.0,
    "verbose": 0, "resid_pdrop": 0, "emb_pdrop": 0, "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "init_config": {"name": "kaiming_normal_", "init_gain": 0}, "use_cache": False,
    "attn_config": {
        "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0,
        "attn_type": "multihead_attention", "attn_uses_sequence_id": False, "clip_qkv": None,
        "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
    },
}  # fmt: skip
_XGLM = {
    "d_model": 48, "attention_heads": 4, "num_layers": 2, "ffn_dim": 56, "vocab_size": 61,
    "max_position_embeddings": 64, "activation_function": "gelu", "scale_embedding": True,
    "pad_token_id": 1, "decoder_start_token_id": 2, "init_std": 0.02,
}  # fmt: skip
_GPT_NEO = {
    "hidden_size": 48, "num_heads": 4, "num_layers": 2, "vocab_size": 61, "window_size": 4,
    "max_position_embeddings": 64, "intermediate_size": None, "activation_function": "gelu_new",
    "attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"],
    "layer_norm_epsilon": 1e-5, "resid_dropout": 0, "embed_dropout": 0,
}  # fmt: skip

PUBLISHED: dict[str, Settings] = {
    "gpt_neox-pythia": _NEOX | {"use_parallel_residual": True},
    "gpt_neox-20b": _NEOX | {"hidden_act": "gelu_fast", "attention_probs_dropout_prob": 0},
    "gpt_neox-serial": _NEOX | {"rotary_pct": 1.0, "use_parallel_residual": False},
    "gpt_neox-both_spellings": _NEOX
    | {"rope_theta": 10000, "partial_rotary_factor": 0.25, "rope_scaling": None},
    "gpt_neox-names_of_others": _NEOX | {"rope_theta": 500, "partial_rotary_factor": 1.0},
    "gptj-6b": _GPTJ | {"n_inner": None, "rotary": True, "scale_attn_weights": True},
    "gptj-jax": _GPTJ
    | {"jax": True, "attention_layers": ["global"] * 2, "window_size": 4, "num_heads": 16},
    "gptj-kobold": _GPTJ | {"welcome": "hello", "sampler_order": [6, 0], "temp": 0.5, "rep_pen": 2},
    "gpt_neo-125m": _GPT_NEO,
    "llama-first_conversion": _LLAMA | {"max_sequence_length": 2048},
    "llama-without_context": {k: v for k, v in _LLAMA.items() if k != "max_position_embeddings"},
    "llama-kobold": _LLAMA | {"badwordsids": [[0]], "antemplate": "<|>", "newlinemode": "s"},
    "llama-2": _GROUPED | {"num_key_value_heads": 4, "rope_scaling": None, "use_cash": True},
    "llama-2_70b": _GROUPED | {"num_key_value_heads": 1, "pretraining_tp": 2},
    "llama-code": _GROUPED | {"rope_theta": 1000000, "max_position_embeddings": 16384},
    "llama-linear": _GROUPED | {"rope_scaling": {"factor": 4.0, "type": "linear"}},
    "llama-3": _LLAMA_3,
    "llama-3_2": _LLAMA_3 | {"head_dim": 12, "tie_word_embeddings": True, "unsloth_fixed": True},
    "llama-transformers_5": _LLAMA
    | {
        "rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"},
        "dtype": "bfloat16",
        "torch_dtype": None,
    },
    "llama-smol": _GROUPED
    | {
        "is_llama_config": True,
        "rope_interleaved": False,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    },
    "llama-token_names": _LLAMA | {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"},
    "llama-names_of_others": _GROUPED | {"rotary_emb_base": 500, "rotary_pct": 0.25},
    "llama-nulls": _GROUPED | {"sliding_window": None, "layer_types": None, "head_dim": None},
    "mistral-7b": _MISTRAL,
    "mistral-7b_v2": _MISTRAL | {"sliding_window": None, "rope_theta": 1000000.0},
    "mistral-24b": _MISTRAL | {"head_dim": 16, "rope_theta": 1e8, "sliding_window": None},
    "mistral-yarn": _MISTRAL
    | {
        "max_sequence_length": 131072,
        "rope_scaling": {
            "factor": 16.0,
            "finetuned": True,
            "attn_factor": 3.0,
            "original_max_position_embeddings": 8192,
            "type": "yarn",
        },
    },
    "mixtral-8x22b": _MIXTRAL,
    "qwen3-0.6b": _QWEN3 | {"tie_word_embeddings": True},
    "qwen3-8b": _QWEN3 | {"head_dim": 12},
    "bloom-560m": _BLOOM | {"n_inner": None, "seq_length": 2048},
    "bloom-176b": _BLOOM | {"slow_but_exact": False, "unk_token_id": 0},
    "opt-1.3b": _OPT,
    "opt-13b": _OPT | {"_remove_final_layer_norm": False, "output_projection": True},
    "mpt-7b": _MPT,
    "xglm-fairseq": _XGLM | {"antemplate": "[Theme: <|>]", "newlinemode": "s", "welcome": "hello"},
}
