"""Tiny configs of the later relatives of Llama; see `cases`."""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]

PHI3: dict[str, Settings] = {
    "windowed": {
        "hidden_size": 48,
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
        "intermediate_size": 56,
        "max_position_embeddings": 64,
        "num_key_value_heads": None,
        "original_max_position_embeddings": 64,
        "pad_token_id": None,
        "rms_norm_eps": 3e-4,
        "rope_scaling": None,
        "sliding_window": 5,
        "vocab_size": 53,
    },
    # Longer than the trained context; only a part of each head is rotated.
    "longrope": {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_hidden_layers": 2,
        "intermediate_size": 42,
        "hidden_act": "gelu",
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 4,
        "pad_token_id": None,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.5, 2.0, 7.0],
            "short_factor": [1.0, 1.1, 1.2],
        },
        "rope_theta": 500.0,
        "vocab_size": 61,
    },
    # Within the trained context, under the type's first name.
    "su_tied": {
        "hidden_size": 72,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "num_hidden_layers": 1,
        "intermediate_size": 60,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 64,
        "pad_token_id": None,
        "rope_scaling": {
            "type": "su",
            "original_max_position_embeddings": 64,
            "long_factor": [1.5, 2.0, 7.0],
            "short_factor": [1.0, 1.1, 1.2],
        },
        "tie_word_embeddings": True,
        "vocab_size": 67,
    },
}

QWEN2: dict[str, Settings] = {
    "published": {
        "hidden_size": 48,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 56,
        "max_position_embeddings": 64,
        "max_window_layers": 1,
        "rope_theta": 1000000.0,
        "sliding_window": 3,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 53,
    },
    "windowed": {
        "hidden_size": 36,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_hidden_layers": 3,
        "intermediate_size": 42,
        "max_position_embeddings": 48,
        "max_window_layers": 1,
        "rms_norm_eps": 3e-4,
        "rope_scaling": {
            "type": "yarn",
            "factor": 3.0,
            "original_max_position_embeddings": 16,
        },
        "sliding_window": 4,
        "use_sliding_window": True,
        "vocab_size": 61,
    },
    "layer_types": {
        "hidden_size": 44,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 36,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window": 3,
        "use_sliding_window": True,
        "vocab_size": 67,
    },
}

STABLELM: dict[str, Settings] = {
    "published": {
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 56,
        "layer_norm_eps": 3e-4,
        "max_position_embeddings": 72,
        "partial_rotary_factor": 0.25,
        "qk_layernorm": False,
        "rope_theta": 500.0,
        "use_parallel_residual": False,
        "use_qkv_bias": True,
        "vocab_size": 53,
    },
    # StableLM 2 12B; a share of the head that is not a whole number of dimensions.
    "parallel_normed": {
        "hidden_size": 60,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_hidden_layers": 2,
        "intermediate_size": 42,
        "max_position_embeddings": 48,
        "qk_layernorm": True,
        "rope_parameters": {
            "rope_type": "linear",
            "rope_theta": 500.0,
            "factor": 2.0,
            "partial_rotary_factor": 0.45,
        },
        "use_parallel_residual": True,
        "vocab_size": 61,
    },
    # Keys are normed by a scale per KV head; more shards than KV heads.
    "normed_tied": {
        "hidden_size": 96,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 36,
        "hidden_act": "gelu",
        "max_position_embeddings": 40,
        "qk_layernorm": True,
        "tie_word_embeddings": True,
        "vocab_size": 67,
    },
}
