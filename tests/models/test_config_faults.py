"""Configs with wrong values: every complaint is ours, all are collected, and none takes long."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mtj_loader.errors import ConfigError, ConfigMismatchError
from mtj_loader.formats.hf_config import normalize
from mtj_loader.formats.known_settings import ignored_settings
from mtj_loader.formats.leave_out import leave_out
from mtj_loader.models import FAMILIES, family
from mtj_loader.models.config import ModelConfig
from tests.parity.cases import CASES, config_json
from tests.support import neox

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 10**30, -0.5, 0.5, 1e308, 1e-320, "", "x", "silu",
    [], [None], [[["global"], 3]], ["full_attention"], {}, {"a": 1}, {"type": ["a"]},
    {"type": "linear", "factor": 0}, {"rope_type": "dynamic"}, {"rope_type": "llama3"},
    {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 1},
    {"rope_type": "longrope", "short_factor": [1], "long_factor": []},
    {"full_attention": {"rope_type": "linear"}, "sliding_attention": 3}, {"alibi": 0},
]  # fmt: skip
OTHERS = ("rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor", "layer_types")


def read(config: dict[str, Any]) -> ModelConfig:
    problems: list[ConfigError] = []
    hf = normalize(config, file="config.json", problems=problems)
    return family(config["model_type"]).Config.read(hf, file="config.json", problems=problems)


def keys_in_file(error: ConfigError) -> list[str]:
    """The keys that an error names, without those of absent settings."""
    problems = error.problems if isinstance(error, ConfigMismatchError) else [error]
    present = [p for p in problems if p.found not in (None, "null", '"default"')]
    return [key for problem in present for key in str(problem.key).split(" and ")]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_wrong_values_are_refused_or_read(model_type: str) -> None:
    choose = random.Random(model_type)
    refused = 0
    for _ in range(300):
        cases = list(CASES.get(model_type, ()))
        config = config_json(model_type, choose.choice(cases)) if cases else dict(neox.CONFIG)
        keys = [*(key for key in config if key != "model_type"), *OTHERS]
        config |= {key: choose.choice(VALUES) for key in choose.choices(keys, k=3)}
        ignored_settings(config)
        try:
            read(config)
        except ConfigError as error:  # no other error
            refused += 1
            for key in keys_in_file(error):
                leave_out(config, [key], file="config.json")  # no error
    assert 100 < refused < 300


def test_one_million_attention_types_are_counted_and_not_expanded() -> None:
    types = [[["global"] * 1000, 10**9]] * 100
    with pytest.raises(ConfigError, match="attention types for 100000000000000 layers"):
        read({"model_type": "gpt_neo", "attention_types": types})


def test_a_billion_heads_are_refused_before_anything_counts_to_them() -> None:
    sizes = {"num_attention_heads": 2**30, "head_dim": 2, "hidden_size": 64}
    with pytest.raises(ConfigError, match="num_attention_heads"):
        read({"model_type": "llama", **sizes})


FOLLOWS = [  # a wrong value, and checks that follow from it and say nothing of their own
    ("llama", {"hidden_size": "wide", "num_attention_heads": 7}, "hidden_size"),
    ("llama", {"num_attention_heads": 0, "num_key_value_heads": 3}, "num_attention_heads"),
    ("llama", {"head_dim": -1, "rope_scaling": {"type": "yarn", "factor": 2}}, "head_dim"),
    ("gptj", {"n_embd": [], "rotary_dim": 64}, "n_embd"),
    ("gpt_neo", {"num_layers": "many"}, "num_layers"),
    ("mixtral", {"num_local_experts": "many", "num_experts_per_tok": 2}, "num_local_experts"),
    ("mpt", {"d_model": None, "n_heads": "all", "expansion_ratio": 4}, "n_heads"),
    (
        "llama",
        {
            "rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]},
            "partial_rotary_factor": 9.0,
        },
        "rope_parameters.partial_rotary_factor",
    ),
]


@pytest.mark.parametrize(("model_type", "settings", "key"), FOLLOWS)
def test_what_follows_from_a_wrong_value_is_no_complaint_of_its_own(
    model_type: str, settings: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read({"model_type": model_type, **settings})
    found = caught.value
    problems = found.problems if isinstance(found, ConfigMismatchError) else [found]
    assert {problem.key for problem in problems} == {key}
