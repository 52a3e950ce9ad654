"""Configs of MTJ's families: published files, defaults, other spellings, refusals."""

from __future__ import annotations

import pytest

from mtj_loader import models
from mtj_loader.errors import ConfigError, MeshError
from mtj_loader.formats import hf_config
from mtj_loader.models.config import ModelConfig


def read(model_type: str, **settings: object) -> ModelConfig:
    config = {"model_type": model_type, **settings}
    normal = hf_config.normalize(config, file="config.json")
    return models.family(model_type).Config.read(normal, file="config.json")


# Keys of every published config.json that do not change the model.
COMMON: dict[str, object] = {
    "architectures": ["SomeForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 2,
    "torch_dtype": "float16",
    "transformers_version": "4.20.0",
    "use_cache": True,
}
SUMMARY: dict[str, object] = {
    "gradient_checkpointing": False,
    "initializer_range": 0.02,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "tokenizer_class": "GPT2Tokenizer",
}
GPT_J_6B = COMMON | SUMMARY | {
    "activation_function": "gelu_new",
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "layer_norm_epsilon": 1e-05,
    "n_embd": 4096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2048,
    "resid_pdrop": 0.0,
    "rotary": True,
    "rotary_dim": 64,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "vocab_size": 50400,
}  # fmt: skip
GPT_NEO_2_7B = COMMON | SUMMARY | {
    "activation_function": "gelu_new",
    "attention_dropout": 0,
    "attention_layers": ["global", "local"] * 16,
    "attention_types": [[["global", "local"], 16]],
    "embed_dropout": 0,
    "hidden_size": 2560,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 2048,
    "num_heads": 20,
    "num_layers": 32,
    "resid_dropout": 0,
    "vocab_size": 50257,
    "window_size": 256,
}  # fmt: skip
OPT_350M = COMMON | {
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "attention_dropout": 0.0,
    "do_layer_norm_before": False,
    "dropout": 0.1,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "pad_token_id": 1,
    "prefix": "</s>",
    "vocab_size": 50272,
    "word_embed_proj_dim": 512,
}
XGLM_564M = COMMON | {
    "activation_dropout": 0,
    "activation_function": "gelu",
    "attention_dropout": 0.1,
    "attention_heads": 16,
    "d_model": 1024,
    "decoder_start_token_id": 2,
    "dropout": 0.1,
    "ffn_dim": 4096,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "num_layers": 24,
    "pad_token_id": 1,
    "scale_embedding": True,
    "vocab_size": 256008,
}
BLOOM_560M = COMMON | {
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True,
    "n_embed": 1024,
    "n_inner": None,
    "n_layer": 24,
    "num_attention_heads": 16,
    "offset_alibi": 100,
    "pretraining_tp": 1,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "unk_token_id": 0,
    "vocab_size": 250880,
}

PUBLISHED = {
    "gptj": (GPT_J_6B, (4096, 28, 16, 256, 4096, 16384, 50400, False)),
    "gpt_neo": (GPT_NEO_2_7B, (2560, 32, 20, 128, 2560, 10240, 50257, True)),
    "opt": (OPT_350M, (1024, 24, 16, 64, 512, 4096, 50272, True)),
    "xglm": (XGLM_564M, (1024, 24, 16, 64, 1024, 4096, 256008, True)),
    "bloom": (BLOOM_560M, (1024, 24, 16, 64, 1024, 4096, 250880, True)),
}


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_published_configs(model_type: str):
    settings, sizes = PUBLISHED[model_type]
    config = read(model_type, **settings)
    assert sizes == (
        config.d_model,
        config.layers,
        config.n_heads,
        config.head_dim,
        config.d_embed,
        config.d_ff,
        config.vocab_size,
        config.tie_word_embeddings,
    )
    assert (config.max_positions, config.norm_eps) == (2048, 1e-5)
    assert models.usable_shards(config, 8)[-1] >= 4


def test_what_families_add_to_published_configs():
    rope = read("gptj", **GPT_J_6B).rope
    assert rope is not None
    assert (rope.exponent_dim, rope.theta, rope.scale) == (64, 10000.0, 1.0)
    assert read("gpt_neo", **GPT_NEO_2_7B).windows == (None, 256) * 16
    opt = read("opt", **OPT_350M)
    assert (opt.norm_before, opt.final_norm, opt.bias, opt.affine_norms) == (
        False,
        False,
        True,
        True,
    )
    xglm = read("xglm", **XGLM_564M)
    assert (xglm.scale_embedding, xglm.pad_token_id) == (True, 1)
    bloom = read("bloom", **BLOOM_560M)
    assert (bloom.activation, bloom.residual_after_norm) == ("gelu_pytorch_tanh", False)


# The defaults of transformers' config classes.
DEFAULTS = {
    "gptj": (4096, 28, 16, 16384, 2048, 50400, "gelu_new", False),
    "gpt_neo": (2048, 24, 16, 8192, 2048, 50257, "gelu_new", True),
    "opt": (768, 12, 12, 3072, 2048, 50272, "relu", True),
    "xglm": (1024, 24, 16, 4096, 2048, 256008, "gelu", True),
    "bloom": (64, 2, 8, 256, 2048, 250880, "gelu_pytorch_tanh", True),
}


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_defaults_are_those_of_transformers(model_type: str):
    config = read(model_type)
    assert DEFAULTS[model_type] == (
        config.d_model,
        config.layers,
        config.n_heads,
        config.d_ff,
        config.max_positions,
        config.vocab_size,
        config.activation,
        config.tie_word_embeddings,
    )
    assert read(model_type, n_inner=None, ffn_dim=None, intermediate_size=None) == config


SYNONYMS = [
    ("gptj", "hidden_size", "n_embd", 4096 * 2),
    ("gptj", "num_attention_heads", "n_head", 8),
    ("gptj", "num_hidden_layers", "n_layer", 3),
    ("gptj", "max_position_embeddings", "n_positions", 77),
    ("gpt_neo", "num_attention_heads", "num_heads", 8),
    ("xglm", "hidden_size", "d_model", 2048),
    ("xglm", "num_attention_heads", "attention_heads", 8),
    ("xglm", "num_hidden_layers", "num_layers", 3),
    ("bloom", "n_embed", "hidden_size", 128),
    ("bloom", "num_attention_heads", "n_head", 4),
    ("bloom", "num_hidden_layers", "n_layer", 3),
]


@pytest.mark.parametrize(("model_type", "other", "name", "value"), SYNONYMS)
def test_other_spellings(model_type: str, other: str, name: str, value: int):
    config = read(model_type, **{name: value})
    assert config != read(model_type)
    assert read(model_type, **{other: value}) == config
    assert read(model_type, **{other: value, name: value}) == config
    assert read(model_type, **{other: value, name: None}) == config
    with pytest.raises(ConfigError, match="two spellings of one setting disagree") as caught:
        read(model_type, **{other: value, name: value + 64})
    assert other in str(caught.value)
    assert name in str(caught.value)


REFUSALS = [
    ("gptj", {"rotary": False}, "rotary", "not supported"),
    ("gptj", {"scale_attn_weights": False}, "scale_attn_weights", "not supported"),
    ("gptj", {"rotary_dim": 63}, "rotary_dim", "an even number"),
    ("gptj", {"rotary_dim": 258}, "rotary_dim", "a whole number from 1 to 256"),
    ("gptj", {"rotary_dim": 0}, "rotary_dim", "a whole number from 1"),
    ("gptj", {"n_embd": 4100}, "n_embd", "not a multiple of n_head"),
    ("gptj", {"activation_function": "mish"}, "activation_function", "one of gelu"),
    ("gpt_neo", {"num_layers": 4}, "attention_types", "types for 24 layers, and there are 4"),
    ("gpt_neo", {"attention_types": [[["global"], 3]]}, "attention_types", "for 3 layers"),
    ("gpt_neo", {"attention_types": [[["random"], 24]]}, "attention_types", "not supported"),
    ("gpt_neo", {"attention_types": [["global", 24]]}, "attention_types", "not a legal value"),
    ("gpt_neo", {"attention_types": [[["global"], 10**9]]}, "attention_types", "for 1000000000 l"),
    ("gpt_neo", {"attention_types": [[["global"], -1]]}, "attention_types", "not a legal value"),
    ("gpt_neo", {"rotary": True}, "rotary", "not supported"),
    ("gpt_neo", {"attention_types": "global"}, "attention_types", "not a legal value"),
    ("gpt_neo", {"attention_layers": "local"}, "attention_types", "for 1 layers|not a legal value"),
    (
        "gpt_neo",
        {"attention_types": [[["global"], 24]], "attention_layers": ["local"] * 24},
        "attention_layers",
        "disagree",
    ),
    ("gpt_neo", {"window_size": 0}, "window_size", "a whole number from 1"),
    ("opt", {"learned_embeddings": False}, "learned_embeddings", "not supported"),
    ("opt", {"scale_embeddings": True}, "scale_embeddings", "not supported"),
    ("opt", {"enable_bias": 1}, "enable_bias", "true or false"),
    ("opt", {"word_embed_proj_dim": 0}, "word_embed_proj_dim", "a whole number from 1"),
    ("xglm", {"pad_token_id": -1}, "pad_token_id", "a whole number from 0"),
    ("xglm", {"d_model": 2, "attention_heads": 1}, "d_model", "a whole number from 4"),
    ("xglm", {"add_cross_attention": True}, "add_cross_attention", "not supported"),
    ("bloom", {"n_inner": 100}, "n_inner", "expected: 256"),
    ("bloom", {"slow_but_exact": True}, "slow_but_exact", "not supported"),
]


@pytest.mark.parametrize(("model_type", "settings", "key", "wording"), REFUSALS)
def test_refusals(model_type: str, settings: dict, key: str, wording: str):
    with pytest.raises(ConfigError, match=wording) as caught:
        read(model_type, **settings)
    assert str(caught.value.key).startswith(key)
    assert caught.value.file == "config.json"


def names(config: ModelConfig) -> set[str]:
    specs = models.parameters(config, 1, False)
    return {f"{spec.module} {spec.param}".replace("layer_0/~/", "") for spec in specs}


PROJECTION = "projection_shard/~/linear"
FINAL_NORM = {f"projection_shard/~/replicated_layer_norm {p}" for p in ("scale", "offset")}


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_a_tied_model_has_no_projection_of_its_own(model_type: str):
    sizes: dict[str, object] = {"num_layers": 1} if model_type == "xglm" else {}
    tied = names(read(model_type, tie_word_embeddings=True, **sizes))
    untied = names(read(model_type, tie_word_embeddings=False, **sizes))
    assert untied - tied == {f"{PROJECTION} w"}
    assert (f"{PROJECTION} b" in tied) == (model_type == "gptj")


def test_galactica_has_no_biases_and_no_norms():
    config = read(
        "opt", num_hidden_layers=1, enable_bias=False, layer_norm_elementwise_affine=False
    )
    linears = ["linear", "linear_1", "linear_2", "linear_3", "linear_4", "linear_5"]
    assert names(config) == {
        "embedding_shard/~/linear w",
        "embedding_shard pos_embs",
        *(f"{linear} w" for linear in linears),
    }


@pytest.mark.parametrize(
    "settings", [{"do_layer_norm_before": False}, {"_remove_final_layer_norm": True}]
)
def test_opt_without_a_final_norm(settings: dict):
    assert names(read("opt")) - names(read("opt", **settings)) == FINAL_NORM


def test_opt_has_projections_if_widths_differ():
    more = names(read("opt", word_embed_proj_dim=512)) - names(read("opt", word_embed_proj_dim=768))
    assert more == {"embedding_shard project_in", "projection_shard project_out"}


def test_shards_must_divide_the_width_of_the_embedding():
    config = read("opt", word_embed_proj_dim=510)  # 12 heads
    assert models.usable_shards(config, 12) == [1, 2, 3, 6]
    with pytest.raises(MeshError, match=r"4 shards do not divide the model: d_embed \(510\)"):
        models.check_shards(config, 4)
