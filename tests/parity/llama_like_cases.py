"""Tiny configs of the later relatives of Llama; see `cases`."""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]

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
