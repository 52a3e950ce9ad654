"""config.json: one spelling for all versions."""

from __future__ import annotations

import pytest

from mtj_loader.errors import ConfigError
from mtj_loader.formats.hf_config import (
    add_spellings,
    canonicalize,
    normalize,
)


def normal(**config):
    return normalize(config, file="config.json")


def gemma3(full_attention: object, **settings: object) -> dict[str, object]:
    """A config with one section of rope_parameters, and settings at the top level."""
    rope = {"full_attention": full_attention}
    return {"model_type": "gemma3_text", "rope_parameters": rope, **settings}


def test_old_spelling_gains_the_new_one():
    config = normal(rotary_pct=0.5, rotary_emb_base=500, torch_dtype="float16")
    assert config["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 500,
        "partial_rotary_factor": 0.5,
    }
    assert config["dtype"] == "float16"
    assert config["rope_scaling"] is None
    assert config["rope_theta"] == 500


def test_new_spelling_gains_the_old_one():
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    config = normal(rope_parameters=rope, dtype="bfloat16")
    assert config["rotary_pct"] == 0.25
    assert config["rotary_emb_base"] == 1e4
    assert config["rope_scaling"] == {**rope, "type": "linear"}
    assert config["torch_dtype"] == "bfloat16"


def test_old_and_new_rope_scaling_become_rope_parameters():
    for key in ("type", "rope_type"):
        config = normal(rope_scaling={key: "dynamic", "factor": 3})
        assert config["rope_parameters"] == {"rope_type": "dynamic", "factor": 3}


def test_rope_type_replaces_the_old_name_beside_it():
    """transformers writes both for a Phi-3 whose type was called "su"."""
    config = normal(rope_parameters={"type": "su", "rope_type": "longrope"})
    assert config["rope_parameters"] == {"rope_type": "longrope"}


def test_normalizing_twice_changes_nothing():
    config = normal(rotary_pct=0.5, rope_scaling={"type": "linear", "factor": 2.0}, hidden_size=8)
    assert normalize(config, file="config.json") == config


def test_a_config_without_rope_gains_none():
    config = normal(hidden_size=8, rope_scaling=None)
    assert config == {"hidden_size": 8, "rope_scaling": None}


def test_the_input_is_not_changed():
    rope = {"rope_theta": 10}
    config = {"rope_parameters": rope}
    normalize(config, file="config.json")
    assert config == {"rope_parameters": {"rope_theta": 10}}


@pytest.mark.parametrize(
    ("config", "names", "values"),
    [
        (
            {"rotary_pct": 0.25, "rope_parameters": {"partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor and rotary_pct",
            "0.5 and 0.25",
        ),
        ({"rope_theta": 1, "rotary_emb_base": 2}, "rope_theta and rotary_emb_base", "1 and 2"),
        (
            {"dtype": "float16", "torch_dtype": "float32"},
            "dtype and torch_dtype",
            '"float16" and "float32"',
        ),
        (
            {"rope_scaling": {"type": "linear"}, "rope_parameters": {"rope_type": "yarn"}},
            "rope_parameters.rope_type and rope_scaling.type",
            '"yarn" and "linear"',
        ),
        (
            {
                "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 5},
                "rope_scaling": {"type": "linear", "factor": 2},
            },
            "rope_parameters and rope_scaling",
            "rope_theta only in one of them",
        ),
        (
            {"rope_theta": 1, "rotary_emb_base": True},
            "rope_theta and rotary_emb_base",
            "1 and true",
        ),
        (
            gemma3({"rope_type": "linear", "factor": 4}, rope_scaling={"factor": 8}),
            "rope_parameters.full_attention.factor and rope_scaling.factor",
            "4 and 8",
        ),
        (
            gemma3({"rope_type": "default"}, rope_scaling={"type": "linear"}),
            "rope_parameters.full_attention.rope_type and rope_scaling.type",
            '"default" and "linear"',
        ),
        (
            gemma3({"rope_theta": 7}, rope_theta=9),
            "rope_parameters.full_attention.rope_theta and rope_theta",
            "7 and 9",
        ),
    ],
)
def test_spellings_that_disagree_are_refused(config, names, values):
    with pytest.raises(ConfigError, match="two spellings of one setting disagree") as caught:
        normal(**config)
    assert (caught.value.key, caught.value.found) == (names, values)
    assert caught.value.file == "config.json"


def test_equal_numbers_of_different_types_agree():
    assert normal(rope_theta=10000, rotary_emb_base=10000.0)["rope_theta"] == 10000


def test_rope_parameters_must_be_an_object():
    with pytest.raises(ConfigError, match="not an object") as caught:
        normal(rope_parameters=[1])
    assert caught.value.key == "rope_parameters"


def test_the_section_of_a_layer_type_must_be_an_object():
    with pytest.raises(ConfigError, match="not an object") as caught:
        normal(**gemma3([1]))
    assert caught.value.key == "rope_parameters.full_attention"


def test_rope_scaling_belongs_to_full_attention():
    scaling = {"rope_type": "linear", "factor": 8}
    config = normal(**gemma3({"rope_theta": 7}, rope_scaling=scaling, rope_local_base_freq=3))
    assert config["rope_parameters"] == {
        "full_attention": {"rope_type": "linear", "factor": 8, "rope_theta": 7},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3},
    }
    assert normal(**config) == config
    both_names = normal(**gemma3({"rope_type": "default", "type": "linear"}))["rope_parameters"]
    assert both_names["full_attention"] == {"rope_type": "default"}  # as in transformers


def test_a_type_that_transformers_does_not_read_is_refused():
    """It sets `rope_type` to "default" first, and then ignores `type`."""
    with pytest.raises(ConfigError, match="does not read this name") as caught:
        normal(model_type="gemma3_text", rope_scaling={"type": "linear", "factor": 8})
    assert caught.value.key == "rope_scaling.type"


SPELLINGS = {
    "hidden_size": ("n_embd", "hidden_size"),
    "hidden_act": ("activation_function",),
    "norm_eps": (),
}
DEFAULTS = {"hidden_size": 64, "hidden_act": "relu", "norm_eps": 1e-5}


def canonical(**config):
    return canonicalize(config, spellings=SPELLINGS, defaults=DEFAULTS, file="config.json")


def test_settings_get_their_standard_names():
    found = canonical(n_embd=8, activation_function="gelu", vocab_size=3)
    expected = {"hidden_size": 8, "hidden_act": "gelu", "norm_eps": 1e-5, "vocab_size": 3}
    assert found.settings == expected
    assert found.spellings["hidden_size"] == "n_embd"
    assert canonical(hidden_size=8).spellings["hidden_size"] == "hidden_size"
    assert canonical().spellings["hidden_size"] == "n_embd"  # the family's own name


def test_null_means_absent_except_for_a_few_settings():
    settings = canonical(n_embd=None, sliding_window=None).settings
    assert settings == {**DEFAULTS, "sliding_window": None}


@pytest.mark.parametrize("key", ["hidden_act", "norm_eps"])
def test_a_standard_name_that_the_family_does_not_use_is_no_setting(key):
    """transformers ignores it, so that it must not be taken for the family's own name."""
    found = canonical(**{key: "silu"})
    assert (found.settings, found.others) == (DEFAULTS, (key,))


def test_canonical_settings_that_disagree_are_refused():
    with pytest.raises(ConfigError, match="two spellings of one setting disagree") as caught:
        canonical(n_embd=8, hidden_size=9)
    assert caught.value.key == "n_embd and hidden_size"


def test_added_spellings():
    config = {"hidden_size": 8, "activation_function": "gelu", "n_embd": None, "other": 1}
    assert add_spellings(config, SPELLINGS) == {
        "hidden_size": 8,
        "n_embd": 8,
        "activation_function": "gelu",
        "hidden_act": "gelu",
        "other": 1,
    }
