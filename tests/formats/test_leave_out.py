"""Settings are left out by every key that a message may name."""

from __future__ import annotations

from typing import Any

import pytest

from mtj_loader.errors import UsageError
from mtj_loader.formats.leave_out import leave_out


def test_settings_are_left_out_by_name_or_path() -> None:
    config = {"a": 1, "b": {"c": 2, "d": 3}, "rope_scaling": {"x": 4}, "e.f": 5}
    expected = {"b": {"d": 3}, "rope_scaling": {}}
    keys = ["a", "b.c", "rope_parameters.x", "e.f"]
    assert leave_out(config, keys, file="config.json") == expected
    assert config["b"] == {"c": 2, "d": 3}
    for key in ("hidden", "b.x", "a.b", ""):
        with pytest.raises(UsageError, match="does not have") as caught:
            leave_out(config, [key], file="config.json")
        assert (caught.value.file, caught.value.key) == ("config.json", key)


FULL, SLIDING = "rope_parameters.full_attention", "rope_parameters.sliding_attention"
NESTED = {"rope_parameters": {"full_attention": {"conv": 1, "rope_theta": 5}}, "rope_theta": 5}
SPELLINGS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("gemma3_text", NESTED, f"{FULL}.conv", {
        "rope_parameters": {"full_attention": {"rope_theta": 5}}, "rope_theta": 5,
    }),
    ("gemma3_text", NESTED, f"{FULL}.rope_theta", {
        "rope_parameters": {"full_attention": {"conv": 1}},
    }),
    ("gemma3_text", {"rope_local_base_freq": 1}, f"{SLIDING}.rope_theta", {}),
    ("gemma3_text", {"rope_scaling": {"factor": 0}}, f"{FULL}.factor", {"rope_scaling": {}}),
    ("llama", {"rope_theta": 1}, "rope_parameters.rope_theta", {}),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor", {
        "rope_parameters": {},
    }),
    ("gpt_neox", {"rotary_pct": 9}, "rope_parameters.partial_rotary_factor", {}),
    ("llama", {"rope_scaling": {"type": "ntk"}}, "rope_parameters.rope_type", {"rope_scaling": {}}),
    ("llama", {"rope_theta": 1, "rope_parameters": {"rope_theta": 2}}, "rope_theta", {
        "rope_parameters": {"rope_theta": 2},  # the two disagree
    }),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "settings", "key", "rest"), SPELLINGS)
def test_a_rotary_setting_is_left_out_by_any_spelling(
    model_type: str, settings: dict[str, Any], key: str, rest: dict[str, Any]
) -> None:
    family = {"model_type": model_type}
    assert leave_out(family | settings, [key], file="config.json") == family | rest
