"""Configs of Llama and relatives: published files, defaults, refusals, shard counts."""

from __future__ import annotations

from typing import Any

import pytest

from mtj_loader import models
from mtj_loader.errors import ConfigError, MeshError
from mtj_loader.formats import hf_config

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
MIXTRAL_8X7B = {
    **MISTRAL_7B,
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
}
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def read(settings: dict[str, Any]) -> Any:
    normal = hf_config.normalize(settings, file="config.json")
    model_type = settings["model_type"]
    return models.family(model_type).Config.read(normal, file="config.json")


def test_llama_3_1_8b() -> None:
    config = read(LLAMA_3_1_8B)
    assert (config.d_model, config.layers, config.d_ff, config.vocab_size) == (
        4096,
        32,
        14336,
        128256,
    )
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (32, 8, 128)
    assert (config.norm_eps, config.max_positions, config.activation) == (1e-5, 131072, "silu")
    assert (config.rope.theta, config.rope.factor, config.rope.trained_positions) == (5e5, 8, 8192)
    assert (config.attention_bias, config.mlp_bias, config.tie_word_embeddings) == (False,) * 3


def test_mistral_7b() -> None:
    config = read(MISTRAL_7B)
    assert (config.n_kv_heads, set(config.windows), config.rope.theta) == (8, {4096}, 10000)
    assert read({**MISTRAL_7B, "sliding_window": None}).windows == (None,) * 32
    assert read({"model_type": "mistral", "sliding_window": 7}).windows == (7,) * 32


def test_mixtral_8x7b() -> None:
    config = read(MIXTRAL_8X7B)
    assert (config.n_experts, config.experts_per_token, set(config.windows)) == (8, 2, {None})
    assert not config.expert_parallel


def test_qwen3_0_6b() -> None:
    config = read(QWEN3_0_6B)
    assert (config.d_model, config.n_heads, config.n_kv_heads, config.head_dim) == (
        1024,
        16,
        8,
        128,
    )
    assert (config.rope.theta, config.tie_word_embeddings) == (1e6, True)


# n_heads, n_kv_heads, head_dim, d_ff, norm_eps, max_positions and theta of transformers' classes.
DEFAULTS = {
    "llama": (32, 32, 128, 11008, 1e-6, 2048, 1e4),
    "mistral": (32, 8, 128, 14336, 1e-6, 131072, 1e4),
    "mixtral": (32, 8, 128, 14336, 1e-5, 131072, 1e6),
    "qwen2": (32, 32, 128, 22016, 1e-6, 32768, 1e4),
    "qwen3": (32, 32, 128, 22016, 1e-6, 32768, 1e4),
}


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    c = read({"model_type": model_type})
    found = c.n_heads, c.n_kv_heads, c.head_dim, c.d_ff, c.norm_eps, c.max_positions, c.rope.theta
    assert found == DEFAULTS[model_type]
    assert (c.d_model, c.layers, c.activation, c.tie_word_embeddings) == (4096, 32, "silu", False)
    assert c.vocab_size == (151936 if model_type.startswith("qwen") else 32000)
    assert set(c.windows) == {4096 if model_type == "mistral" else None}


SMALL = {
    "hidden_size": 40,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 48,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 3}
ROPE = "rope_parameters."
FULL, LOCAL = (f"rope_parameters.{kind}_attention." for kind in ("full", "sliding"))
REFUSED = [
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads", "cannot share key-value heads"),
    ("llama", {"num_key_value_heads": 0}, "num_key_value_heads", "not a legal value"),
    ("llama", {"head_dim": 0}, "head_dim", "not a legal value"),
    ("llama", {"head_dim": None, "hidden_size": 42}, "hidden_size", "is not a multiple of"),
    ("llama", {"sliding_window": 4}, "sliding_window", "not supported"),
    ("llama", {"hidden_act": "swish"}, "hidden_act", "not a legal value"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config", "not supported"),
    ("llama", {"rope_scaling": {"type": "su"}}, ROPE + "rope_type", "not a legal value"),
    ("llama", {"partial_rotary_factor": 0.5}, ROPE + "partial_rotary_factor", "whole heads"),
    ("mistral", {"sliding_window": 0}, "sliding_window", "not a legal value"),
    ("mistral", {"layer_types": ["full_attention"]}, "layer_types", "not supported"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok", "not a legal value"),
    ("mixtral", {"num_local_experts": 10**6}, "num_local_experts", "not a legal value"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 32}, "layer_types", "gives no width"),
    ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping", "a number above 0"),
    ("gemma2", {"final_logit_softcapping": -1}, "final_logit_softcapping", "not a legal value"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar", "not a legal value"),
    ("gemma2", {"sliding_window": None}, "layer_types", "gives no width"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention", "supported"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping", "not supported"),
    ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern", "not a legal value"),
    ("gemma3_text", {"rope_scaling": {"rope_type": "x"}}, FULL + "rope_type", "not a legal value"),
    ("gemma3_text", {"rope_local_base_freq": 0}, LOCAL + "rope_theta", "a number above 1"),
    ("phi3", {"rope_scaling": {"type": "linear"}}, ROPE + "rope_type", "one of default"),
    ("phi3", {"rope_scaling": LONGROPE}, "original_max_position_embeddings", "is missing"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types", "32 of full_attention"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 32}, "layer_types", "32 of full_attention"),
    ("qwen2", {"use_sliding_window": 1}, "use_sliding_window", "true or false"),
]


@pytest.mark.parametrize(("model_type", "settings", "key", "wording"), REFUSED)
def test_refusals(model_type: str, settings: dict[str, Any], key: str, wording: str) -> None:
    with pytest.raises(ConfigError, match=wording) as caught:
        read({"model_type": model_type, **SMALL, **settings})
    assert caught.value.key == key


def shards_of(**settings: Any) -> list[int]:
    return models.usable_shards(read({"model_type": "llama", **SMALL, **settings}), 32)


def test_key_value_heads_divide_the_shards_or_are_divided() -> None:
    twelve = {"num_attention_heads": 12, "intermediate_size": 96}
    assert shards_of(num_attention_heads=16) == [1, 2, 4, 8, 16]
    assert shards_of(num_attention_heads=16, num_key_value_heads=1) == [1, 2, 4, 8, 16]
    assert shards_of(**twelve, num_key_value_heads=4) == [1, 2, 4, 12]
    assert shards_of(**twelve, num_key_value_heads=6) == [1, 2, 3, 6, 12]
    assert shards_of(**twelve, num_key_value_heads=3) == [1, 3, 6, 12]


def test_key_value_heads_that_do_not_fit() -> None:
    config = read(
        {"model_type": "llama", **SMALL, "num_attention_heads": 12, "num_key_value_heads": 4}
    )
    with pytest.raises(MeshError) as caught:
        models.check_shards(config, 6)
    wanted = (
        "6 shards do not divide the model: key-value heads (4), neither a multiple nor a divisor"
    )
    assert wanted in str(caught.value)
    assert caught.value.expected == "one of 1, 2, 4, 12"
