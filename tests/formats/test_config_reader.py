"""Strict reading of config.json: typed values, refused and ignored keys, all complaints at once."""

from __future__ import annotations

import pytest

from mtj_loader.errors import ConfigError, ConfigMismatchError
from mtj_loader.formats.config_reader import Reader
from mtj_loader.formats.hf_config import normalize
from mtj_loader.formats.known_settings import KEYS_WITHOUT_EFFECT, reads
from mtj_loader.models import family


def reader(**config):
    return Reader(config, "config.json")


@pytest.mark.parametrize("value", [True, 0, -1, 2.0, "2", 2**31, 10**400, [2], {}])
def test_invalid_integers(value):
    with pytest.raises(ConfigError, match="not a legal value") as caught:
        reader(hidden_size=value).integer("hidden_size")
    assert caught.value.key == "hidden_size"
    assert caught.value.expected == "a whole number from 1 to 2147483647"


def test_an_enormous_integer_is_described_not_printed():
    with pytest.raises(ConfigError, match="a whole number of 16610 bits"):
        reader(hidden_size=10**5000).integer("hidden_size")


@pytest.mark.parametrize("value", [False, "1", -0.5, float("nan"), float("inf"), 10**400, [1.0]])
def test_invalid_numbers(value):
    with pytest.raises(ConfigError, match="not a legal value") as caught:
        reader(layer_norm_eps=value).number("layer_norm_eps")
    assert caught.value.expected == "a finite number of at least 0.0"


@pytest.mark.parametrize("value", [0, 1, "true", [True]])
def test_invalid_flags(value):
    with pytest.raises(ConfigError, match="not a legal value") as caught:
        reader(tie=value).flag("tie")
    assert caught.value.expected == "true or false"


@pytest.mark.parametrize("value", ["gelu_10", "GELU", 1, ["gelu"]])
def test_invalid_choices(value):
    with pytest.raises(ConfigError, match="not a legal value") as caught:
        reader(act=value).choice("act", ["gelu", "relu"])
    assert caught.value.expected == "one of gelu, relu"


@pytest.mark.parametrize("value", [1.0, [1.0, True], [1.0, -1.0], ["1"]])
def test_invalid_lists_of_numbers(value):
    with pytest.raises(ConfigError, match="not a legal value"):
        reader(factors=value).numbers("factors")


def test_valid_values():
    config = reader(a=3, b=3, c=[1, 2.5], d=False, e="relu")
    assert config.integer("a", high=3) == 3
    assert config.number("b") == 3.0
    assert isinstance(config.number("b"), float)
    assert config.numbers("c") == (1.0, 2.5)
    assert config.flag("d") is False
    assert config.choice("e", ["relu"]) == "relu"


def test_absent_and_null_take_the_default():
    config = reader(a=None)
    for key in ("a", "b"):
        assert config.integer(key, 7) == 7
        assert config.flag(key, False) is False
        assert not config.has(key)


@pytest.mark.parametrize("config", [{}, {"a": None}])
def test_without_a_default_a_setting_is_required(config):
    with pytest.raises(ConfigError, match="a required setting is missing") as caught:
        reader(**config).integer("a")
    assert caught.value.key == "a"


def refuse_unsupported(config, **options):
    config.refuse_unsupported(lambda key: reads("llama", key), **options)


def test_a_key_that_transformers_reads_and_we_do_not_is_refused():
    config = reader(hidden_size=8, sliding_window=30, use_cache=True)
    config.integer("hidden_size")
    with pytest.raises(ConfigError, match="a setting that is not supported") as caught:
        refuse_unsupported(config)
    assert (caught.value.key, caught.value.found) == ("sliding_window", "30")
    assert "--ignore-setting" in caught.value.hint
    refuse_unsupported(config, without_effect=["sliding_window"])


def test_a_key_that_transformers_does_not_read_is_ignored():
    config = reader(welcome="hello", rep_pen=1.1, use_cache=True, sliding_window=None)
    refuse_unsupported(config)
    assert config.ignored == ["rep_pen", "welcome"]  # neither null nor what is known


def test_keys_without_effect_may_have_any_value():
    config = reader(**dict.fromkeys(KEYS_WITHOUT_EFFECT, "anything"))
    refuse_unsupported(config)
    assert config.ignored == []


def test_import_names_are_ignored():
    refuse_unsupported(reader(auto_map={"AutoConfig": "os.system"}))


@pytest.mark.parametrize(
    ("key", "value", "neutral"),
    [
        ("quantization_config", {"quant_method": "gptq"}, "no such key"),
        ("is_encoder_decoder", True, "false"),
        ("is_causal", False, "true"),
        ("pruned_heads", {"0": [1]}, "{}"),
    ],
)
def test_unsupported_settings_are_refused_by_name(key, value, neutral):
    with pytest.raises(ConfigError, match="a setting that is not supported") as caught:
        refuse_unsupported(reader(**{key: value}))
    assert (caught.value.key, caught.value.expected) == (key, neutral)


def test_unsupported_settings_pass_at_the_default_of_transformers():
    refuse_unsupported(reader(quantization_config=None, is_encoder_decoder=False, pruned_heads={}))


def test_errors_in_rope_parameters_name_the_path():
    config = reader(rope_parameters={"factor": "two"})
    with pytest.raises(ConfigError) as caught:
        config.rope().number("factor")
    assert caught.value.key == "rope_parameters.factor"
    refuse_unsupported(config)


def test_a_long_value_is_shortened():
    with pytest.raises(ConfigError) as caught:
        reader(a="x" * 1000).flag("a")
    assert len(str(caught.value.found)) < 100


def test_one_error_lists_every_complaint():
    config = {
        "model_type": "llama",
        "hidden_size": "wide\n",  # the checks of heads and rope that follow from it are left out
        "num_attention_heads": 7,
        "hidden_act": "swish",
        "rope_scaling": {"type": "linear", "factor": 0},
        "rope_parameters": {"type": "linear", "factor": 2},
        "sliding_window": 8,
        "quantization_config": {"bits": 4},
        "welcome": "hello",
    }
    problems = []
    hf = normalize(config, file="f.json", problems=problems)
    with pytest.raises(ConfigMismatchError) as caught:
        family("llama").Config.read(hf, file="f.json", problems=problems)
    assert [(error.key, error.what) for error in caught.value.problems] == [
        (
            "rope_parameters.factor and rope_scaling.factor",
            "two spellings of one setting disagree",
        ),
        ("hidden_size", "not a legal value"),
        ("hidden_act", "not a legal value"),
        ("quantization_config", "a setting that is not supported"),
        ("sliding_window", "a setting that is not supported"),
    ]
    lines = str(caught.value).splitlines()
    assert lines[0] == "5 settings cannot be used"
    expected = 'expected a whole number from 1 to 1048576, found "wide\\n"'
    assert lines[2] == f"- not a legal value: key hidden_size, {expected}"
    assert lines[-2] == "  file: f.json"
    assert lines[-1].startswith("  hint: --ignore-setting KEY")


def test_complaints_are_capped_and_one_line_each():
    problems = [ConfigError("bad", key=f"k{i}", found="x\n" * 10_000) for i in range(40)]
    error = ConfigMismatchError(problems)
    assert len(str(error).splitlines()) == 1 + 30 + 1
    assert len(str(error)) < 100_000
    assert len(error.problems) == 40
