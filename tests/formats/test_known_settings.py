"""Keys of config.json: which ones transformers reads, and what is said of those that are let in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtj_loader import models
from mtj_loader.errors import ConfigError
from mtj_loader.formats import known_settings
from mtj_loader.formats.hf_config import normalize
from mtj_loader.formats.known_settings import (
    KEYS_WITHOUT_EFFECT,
    ignored_settings,
    reads,
    remarks,
)
from mtj_loader.models.config import ModelConfig

LISTED = json.loads(
    Path(known_settings.__file__).with_name("transformers_settings.json").read_text()
)["transformers_version"]
NEOX = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
SIZES = {"gpt_neox": {**NEOX, "vocab_size": 9}}


def read(model_type: str, settings: dict[str, Any]) -> ModelConfig:
    config = {"model_type": model_type, **SIZES.get(model_type, {}), **settings}
    problems: list[ConfigError] = []
    hf = normalize(config, file="config.json", problems=problems)
    found = models.family(model_type).Config.read(hf, file="config.json", problems=problems)
    assert list(found.ignored_settings) == ignored_settings(config)  # what `inspect` says
    return found


# Of published files: the key is let in, and has no effect.
LET_IN: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"max_sequence_length": 2048}),
    ("llama", {"unsloth_fixed": True}),
    ("llama", {"unsloth_version": "2025.1"}),
    ("llama", {"is_llama_config": True}),
    ("llama", {"rope_interleaved": False}),
    ("llama", {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}}),
    ("llama", {"use_cash": True}),
    ("llama", {"badwordsids": [[0]]}),
    ("xglm", {"antemplate": "[Theme: <|>]"}),
    ("xglm", {"newlinemode": "s"}),
    ("xglm", {"welcome": "## Hello"}),
    ("gptj", {"sampler_order": [6, 0, 1]}),
    ("gptj", {"temp": 0.5}),
    ("gptj", {"rep_pen": 1.1}),
    ("gptj", {"jax": True}),
    ("gptj", {"attention_layers": ["global"]}),
    ("gptj", {"attention_types": [[["global"], 28]]}),
    ("gptj", {"num_heads": 3}),
    ("gptj", {"rope_theta": 5000.0}),
    ("gptj", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("opt", {"output_projection": True}),
    ("opt", {"hidden_act": "silu"}),
    ("bloom", {"alibi": False}),
    ("bloom", {"norm_eps": 1.0}),
    ("mpt", {"attn_cfg": {}}),
    ("mistral", {"attention_bias": True}),
    # transformers takes the base and the share from other names in these families.
    ("llama", {"rotary_emb_base": 500}),
    ("llama", {"rotary_pct": 0.5}),
    ("mistral", {"rotary_emb_base": 500}),
    ("mixtral", {"rotary_emb_base": 500}),
    ("qwen3", {"rotary_emb_base": 500}),
    ("gpt_neox", {"rope_theta": 500}),
    ("gpt_neox", {"partial_rotary_factor": 0.5}),
]


@pytest.mark.parametrize(("model_type", "settings"), LET_IN)
def test_a_key_that_transformers_does_not_read_is_let_in(
    model_type: str, settings: dict[str, Any]
) -> None:
    config = read(model_type, settings)
    assert config == read(model_type, {})
    assert config.ignored_settings == tuple(settings)


# The same, and not worth a remark.
KNOWN: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}),
    ("llama", {"sliding_window": None, "quantization_config": None, "layer_types": None}),
    ("mixtral", {"_model_name_or_path": None}),
    ("llama", {"pretraining_tp": 4}),
    ("gpt_neo", {"resid_dropout": 0.5, "summary_type": "cls_index"}),
    ("gpt_neox", {"rotary_emb_base": 10000, "rotary_pct": 0.25}),
    ("gpt_neox", {"head_dim": 4}),
    ("mpt", {"ffn_config": {"fc_type": "torch", "ffn_type": "mptmlp"}}),
    ("mpt", {"init_config": {"name": "kaiming_normal_"}, "tokenizer_name": "gpt2"}),
]


@pytest.mark.parametrize(("model_type", "settings"), KNOWN)
def test_a_key_that_is_known_to_have_no_effect_is_not_mentioned(
    model_type: str, settings: dict[str, Any]
) -> None:
    config = read(model_type, settings)
    assert config == read(model_type, {})
    assert config.ignored_settings == ()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"sliding_window": 4}, "sliding_window"),  # transformers' cache obeys it
    ("llama", {"layer_types": ["sliding_attention"] * 32}, "layer_types"),
    ("llama", {"attention_chunk_size": 8}, "attention_chunk_size"),
    ("llama", {"partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor"),
    ("llama", {"is_causal": False}, "is_causal"),
    ("llama", {"per_layer_config": {"0": {}}}, "per_layer_config"),
    ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("mistral", {"default_theta": 5.0}, "default_theta"),
    ("gpt_neo", {"rotary": True}, "rotary"),
    ("gemma3_text", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (
        "gemma3_text",
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
        "rope_parameters.full_attention.truncate",
    ),
    (
        "phi3",  # transformers would take 4096 instead, which is the default at the top level
        {
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 48,
                "long_factor": [2.0] * 48,
                "original_max_position_embeddings": 16,
            }
        },
        "original_max_position_embeddings",
    ),
    ("gpt_neox", {"head_dim": 16}, "head_dim"),
    ("mpt", {"attn_config": {"attn_type": "multiquery_attention"}}, "attn_config.attn_type"),
]


@pytest.mark.parametrize(("model_type", "settings", "key"), REFUSED)
def test_a_key_that_transformers_reads_is_refused(
    model_type: str, settings: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(model_type, settings)
    assert caught.value.key == key


@pytest.mark.parametrize("key", ["finetuned", "attn_factor", "original_max_position_embeddings"])
def test_keys_of_a_rope_section_are_let_in_unless_the_type_uses_them(key: str) -> None:
    rope = {"type": "linear", "factor": 2.0, key: 3}
    config = read("llama", {"rope_scaling": rope})
    assert config == read("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.ignored_settings == (f"rope_parameters.{key}",)


def test_the_top_level_and_the_section_agree_on_rope_theta() -> None:
    assert read("llama", {"rope_theta": 500, "rotary_emb_base": 7}).rope.theta == 500  # pyright: ignore[reportOptionalMemberAccess]
    assert read("gpt_neox", {"rotary_emb_base": 500, "rope_theta": 7}).rope.theta == 500  # pyright: ignore[reportOptionalMemberAccess]


def test_every_family_is_listed_and_its_own_names_are_read() -> None:
    for model_type in models.FAMILIES:
        config = models.family(model_type).Config
        assert not reads(model_type, "welcome")
        assert all(reads(model_type, key) for key in config.ignored_keys)
        for standard, names in config.spellings.items():
            # A standard name that the family does not use is let in without effect.
            assert standard in names or not reads(model_type, standard)


def test_a_key_counts_as_read_in_an_unknown_family() -> None:
    assert reads("gpt_neo_y", "welcome")
    assert reads(None, "welcome")
    assert reads(["llama"], "welcome")
    assert ignored_settings({"model_type": "gpt_neo_y", "welcome": 1}) == []


@pytest.mark.parametrize(
    ("config", "doubt"),
    [
        ({"auto_map": {"AutoModel": "m.M"}}, "brings code of its own"),
        ({"transformers_version": "99.0.0.dev0"}, "saved by transformers 99.0.0.dev0"),
        ({"transformers_version": "99." + "9" * 1_000_000}, "is known here"),
        ({"transformers_version": f"{LISTED}.1"}, "saved by transformers"),
        ({"transformers_version": "4.99.9"}, None),
        ({"transformers_version": LISTED}, None),
        ({"transformers_version": ["x"]}, None),
        ({"auto_map": None}, None),
    ],
)
def test_ignored_keys_are_a_warning_where_they_may_matter(
    config: dict[str, Any], doubt: str | None
) -> None:
    notes, warnings = remarks(config, ["a", "b"])
    if doubt is None:
        assert (notes, warnings) == (["ignored settings: a, b"], [])
    else:
        assert notes == []
        assert warnings[0].startswith("ignored settings: a, b; ")
        assert doubt in warnings[0]
        assert len(warnings[0]) < 500
    assert remarks(config, []) == ([], [])


def test_remarks_are_short() -> None:
    (note,), _ = remarks({}, ["x" * 10_000, *map(str, range(100_000))])
    assert len(note) < 500
    assert note.endswith("and 99971 more")


def test_no_size_is_listed_as_without_effect() -> None:
    sizes = {"hidden_size", "rope_theta", "sliding_window", "layer_types", "tie_word_embeddings"}
    assert not sizes & KEYS_WITHOUT_EFFECT
