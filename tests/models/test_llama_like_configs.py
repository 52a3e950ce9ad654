"""Configs of Gemma, Phi-3, Qwen and StableLM: published files and sizes, windows, rope."""

from __future__ import annotations

import math

import pytest

from mtj_loader import models
from mtj_loader.errors import ConfigError
from mtj_loader.models.layers.rope import LongRope, Rope
from tests.models.test_decoder_configs import LONGROPE, SMALL, read


def test_gemma_2_9b() -> None:
    """hidden_act is in published files; transformers reads hidden_activation only."""
    sizes = {"hidden_size": 3584, "num_attention_heads": 16, "num_key_value_heads": 8}
    published = {
        "hidden_act": "relu",
        "query_pre_attn_scalar": 224,
        "cache_implementation": "hybrid",
    }
    config = read({"model_type": "gemma2", **sizes, **published, "num_hidden_layers": 3})
    assert (config.activation, config.score_scale) == ("gelu_pytorch_tanh", 224**-0.5)
    assert (config.score_cap, config.logit_cap, config.head_dim) == (50, 30, 256)
    assert config.windows == (4096, None, 4096)
    uncapped = read({"model_type": "gemma2", "attn_logit_softcapping": None})
    assert (uncapped.score_cap, uncapped.logit_cap) == (None, 30)


GEMMA_3_1B = {
    "cache_implementation": "hybrid",
    "head_dim": 256,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}


def test_gemma_3_1b_of_transformers_4_and_5() -> None:
    old = read(GEMMA_3_1B)
    assert old.windows == ((512,) * 5 + (None,)) * 4 + (512, 512)
    assert [rope.theta for rope in old.ropes] == [1e6, 1e4]
    assert [old.rope_index(layer) for layer in (4, 5)] == [1, 0]
    assert (old.score_cap, old.logit_cap, old.ignored_settings) == (
        None,
        None,
        ("cache_implementation",),
    )
    gone = {"rope_local_base_freq", "rope_scaling", "rope_theta", "sliding_window_pattern"}
    new = {key: value for key, value in GEMMA_3_1B.items() if key not in gone}
    types = ["full_attention" if window is None else "sliding_attention" for window in old.windows]
    new |= {"_sliding_window_pattern": 6, "layer_types": types}
    for rope_theta in ({}, {"rope_theta": 1e4}):
        sections = {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", **rope_theta},
        }
        assert read({**new, "rope_parameters": sections}) == old


def test_the_multimodal_gemma_3_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="only checkpoints of the text model") as caught:
        models.family("gemma3")
    assert caught.value.found == "gemma3"


# Sizes and the number of parameters of published models; those that are left out are the defaults.
QWEN_2_5_0_5B = {
    "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "model_type": "qwen2",
    "num_hidden_layers": 24, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
STABLELM_2_1_6B = {
    "hidden_size": 2048, "intermediate_size": 5632, "model_type": "stablelm",
    "num_hidden_layers": 24, "use_qkv_bias": True, "vocab_size": 100352,
}  # fmt: skip
COUNTS = [
    (QWEN_2_5_0_5B, 494_032_768),
    (STABLELM_2_1_6B, 1_644_515_328),
    ({"model_type": "phi3"}, 3_821_079_552),  # Phi-3 mini
    ({"model_type": "gemma2"}, 2_614_341_888),  # Gemma 2 2B
    (GEMMA_3_1B, 999_885_952),
]


@pytest.mark.parametrize(("config", "count"), COUNTS)
def test_published_models_have_the_published_number_of_parameters(config: dict, count: int) -> None:
    specs = models.parameters(read(config), 1, False)
    assert sum(math.prod(spec.shape) for spec in specs) == count


def test_long_rope_of_phi_3() -> None:
    """Published files have the length before stretching at the top level, and three names."""
    lengths = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    base = {"model_type": "phi3", **SMALL, "head_dim": None, "hidden_size": 48}
    assert type(read({**base, **lengths}).rope) is Rope
    for name in ("longrope", "su", "yarn"):
        rope = read({**base, **lengths, "rope_scaling": {**LONGROPE, "type": name}}).rope
        assert isinstance(rope, LongRope)
        assert (rope.trained_positions, rope.scale) == (16, pytest.approx(1.5**0.5))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_windows_of_qwen(model_type: str) -> None:
    config = {"model_type": model_type, "num_hidden_layers": 3, "sliding_window": 7}
    windowed = {**config, "max_window_layers": 2, "use_sliding_window": True}
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert read(config).windows == (None,) * 3
    assert read(windowed).windows == (None, None, 7)
    assert read({**windowed, "sliding_window": None}).windows == (None,) * 3
    assert read({**windowed, "layer_types": types}).windows == (7, None, 7)
