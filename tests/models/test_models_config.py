"""Configs of the families: defaults, published files, refusals; activations; shard counts."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from mtj_loader import models
from mtj_loader.errors import ConfigError, MeshError
from mtj_loader.models.families import gpt_neox
from mtj_loader.models.layers.feed_forward import ACTIVATIONS
from tests.support.models import read_config

# As EleutherAI published them.
PYTHIA_70M = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 512,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
NEOX_20B = {
    "architectures": ["GPTNeoXForCausalLM"],
    "attention_probs_dropout_prob": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu_fast",
    "hidden_dropout_prob": 0,
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 24576,
    "layer_norm_eps": 1e-05,
    "masked_softmax_fusion": True,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 64,
    "num_hidden_layers": 44,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.19.0.dev0",
    "use_cache": True,
    "vocab_size": 50432,
}
LEAST = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "intermediate_size": 60,
    "vocab_size": 61,
}


def test_pythia():
    config = read_config(PYTHIA_70M)
    assert (config.d_model, config.layers, config.n_heads, config.head_dim) == (512, 6, 8, 64)
    assert (config.n_kv_heads, config.d_embed, config.d_ff) == (8, 512, 2048)
    assert (config.vocab_size, config.max_positions, config.norm_eps) == (50304, 2048, 1e-5)
    assert config.activation == "gelu"
    assert config.parallel_residual
    assert config.attention_bias
    assert not config.tie_word_embeddings
    assert config.rope.exponent_dim == 16


def test_neox_20b():
    config = read_config(NEOX_20B)
    assert (config.d_model, config.layers, config.n_heads, config.d_ff) == (6144, 44, 64, 24576)
    assert config.activation == "gelu_fast"
    assert config.rope.exponent_dim == 24


def test_defaults_are_those_of_transformers():
    config = read_config(LEAST)
    assert config.activation == "gelu"
    assert config.norm_eps == 1e-5
    assert config.max_positions == 2048
    assert config.parallel_residual
    assert config.attention_bias
    assert not config.tie_word_embeddings
    assert (config.rope.theta, config.rope.fraction) == (10000.0, 0.25)


def test_configs_are_hashable_values():
    assert hash(read_config(LEAST)) == hash(read_config(LEAST))
    assert read_config(LEAST) == read_config(LEAST)


@pytest.mark.parametrize(
    ("settings", "key", "wording"),
    [
        (
            {"hidden_size": 50},
            "hidden_size",
            "hidden_size is not a multiple of num_attention_heads",
        ),
        ({"hidden_size": 2**21}, "hidden_size", "from 1 to 1048576"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers", "from 1 to 4096"),
        ({"num_hidden_layers": 0}, "num_hidden_layers", "from 1 to 4096"),
        ({"vocab_size": True}, "vocab_size", "found: true"),
        ({"vocab_size": 10**9}, "vocab_size", "from 1 to 16777216"),
        ({"num_attention_heads": -6}, "num_attention_heads", "a whole number from 1"),
        ({"hidden_act": "gelu_10"}, "hidden_act", "one of gelu, gelu_new"),
        ({"use_parallel_residual": 1}, "use_parallel_residual", "true or false"),
        ({"quantization_config": {"bits": 4}}, "quantization_config", "not supported"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types", "not supported"),
        ({"intermediate_size": None}, "intermediate_size", "is missing"),
    ],
)
def test_refusals(settings, key, wording):
    with pytest.raises(ConfigError, match=wording) as caught:
        read_config({**LEAST, **settings})
    assert caught.value.key == key
    assert caught.value.file == "config.json"


def test_families_are_found_by_name():
    assert models.family("gpt_neox") is gpt_neox


@pytest.mark.parametrize("name", ["os", "config", "gpt_neox.Config", "../gpt_neox", "GPT_NEOX"])
def test_only_families_of_the_closed_list_are_imported(name):
    with pytest.raises(ConfigError, match="unknown model family") as caught:
        models.family(name)
    assert caught.value.expected == "one of " + ", ".join(models.FAMILIES)


def test_usable_shards():
    assert models.usable_shards(read_config(LEAST), 100) == [1, 2, 3, 6]  # of 6 heads and f = 60
    assert models.usable_shards(read_config({**LEAST, "intermediate_size": 62}), 100) == [1, 2]
    assert models.usable_shards(read_config(NEOX_20B), 8) == [1, 2, 4, 8]


def test_a_shard_count_that_does_not_divide_the_model():
    with pytest.raises(MeshError) as caught:
        models.check_shards(read_config(LEAST), 8)
    assert "8 shards do not divide the model: heads (6), feed-forward (60)" in str(caught.value)
    assert caught.value.expected == "one of 1, 2, 3, 6"
    models.check_shards(read_config(LEAST), 6)


def test_a_vocabulary_divides_after_padding():
    config = read_config(LEAST)
    assert [config.padded_vocabulary(n) for n in (1, 2, 3, 6)] == [61, 62, 63, 66]
    (embedding,) = [
        spec
        for spec in models.parameters(config, 6, False)
        if spec.module == "embedding_shard/~/linear"
    ]
    assert embedding.array_shape(6) == (6, 11, 48)


def gelu_tanh(x, root):
    return 0.5 * x * (1 + math.tanh(root * (x + 0.044715 * x**3)))


FORMULAS = {
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_new": lambda x: gelu_tanh(x, math.sqrt(2 / math.pi)),
    "gelu_pytorch_tanh": lambda x: gelu_tanh(x, math.sqrt(2 / math.pi)),
    "gelu_fast": lambda x: gelu_tanh(x, 0.7978845608),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    points = np.linspace(-6, 6, 101).astype(np.float32)
    expected = [FORMULAS[name](float(x)) for x in points]
    values = ACTIVATIONS[name](jnp.asarray(points))
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, expected, atol=1e-6)
