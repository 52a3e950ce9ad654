"""Small models of every family: two layers; over 8 shards, every width of a shard is a multiple of
128."""

from __future__ import annotations

from typing import Any

_SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 2,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
}
_GROUPED = _SIZES | {"num_key_value_heads": 8}

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt_neox": _SIZES,
    "gptj": {
        "n_embd": 2048,
        "n_head": 16,
        "n_layer": 2,
        "n_positions": 2048,
        "rotary_dim": 64,
        "vocab_size": 8192,
    },
    "gpt_neo": {
        "hidden_size": 2048,
        "num_heads": 16,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 256,
        "max_position_embeddings": 2048,
        "vocab_size": 8192,
    },
    "opt": {
        "hidden_size": 2048,
        "word_embed_proj_dim": 2048,
        "ffn_dim": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 2,
        "vocab_size": 8192,
        "max_position_embeddings": 2048,
    },
    "xglm": {
        "d_model": 2048,
        "attention_heads": 16,
        "ffn_dim": 4096,
        "num_layers": 2,
        "vocab_size": 8192,
        "max_position_embeddings": 2048,
    },
    "bloom": {"hidden_size": 2048, "n_head": 16, "n_layer": 2, "vocab_size": 8192},
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 256},
    "mixtral": _GROUPED | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "mpt": {
        "d_model": 2048,
        "n_heads": 16,
        "n_layers": 2,
        "max_seq_len": 2048,
        "vocab_size": 8192,
        "attn_config": {"alibi": True},
    },
    "gemma2": _GROUPED | {"head_dim": 128, "sliding_window": 256},
    "gemma3_text": _GROUPED | {"head_dim": 128, "sliding_window": 256},
    "phi3": _GROUPED | {"pad_token_id": 0},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 128},
    "stablelm": _GROUPED,
}

# One family for each kind of attention and feed-forward: fused projections with rotated halves;
# rotated pairs; ALiBi; learned positions with windows; grouped queries with a gated MLP; norms of
# heads; capped scores; experts.
KINDS = ("gpt_neox", "gptj", "bloom", "gpt_neo", "llama", "qwen3", "gemma2", "mixtral")
