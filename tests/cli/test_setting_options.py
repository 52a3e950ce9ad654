"""The settings of `Model.generate` as options: all of them, and how their texts are read."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from mtj_loader.cli.setting_options import SettingOptions
from mtj_loader.engine.generate_options import descriptions, keywords, read_options
from mtj_loader.errors import UsageError

OWN = {"grammar_file", "json_schema_file"}
OPTIONS: dict[str, Any] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(SettingOptions, include_extras=True).items()
}


def given(**values: object) -> dict[str, Any]:
    """The keyword arguments that differ from the defaults."""
    found: dict[str, Any] = {**SettingOptions(**values).keywords()}
    return {name: v for name, v in found.items() if v != keywords()[name].default}


def test_every_setting_is_an_option_with_its_description():
    assert OPTIONS.keys() - OWN == keywords().keys() == descriptions().keys()
    for name in OPTIONS.keys() - OWN - {"dry_sequence_breakers", "logprobs", "prompt_logprobs"}:
        assert descriptions()[name][1:] in OPTIONS[name].help.replace("\\[", "[")


def test_defaults_are_those_of_generate():
    assert given() == {}
    assert read_options(SettingOptions().keywords()) == read_options({})
    shown = {field.name: field.default for field in fields(SettingOptions)}
    assert (shown["temperature"], shown["max_new_tokens"], shown["logprobs"]) == (0.8, 64, None)


def test_texts_become_values():
    assert given(logit_bias=["12=-1.5", "3=2"]) == {"logit_bias": {12: -1.5, 3: 2.0}}
    assert given(sampler_order="6,0, 1 3 4 2 5") == {"sampler_order": [6, 0, 1, 3, 4, 2, 5]}
    assert given(dry_sequence_breakers=["\n", "x"]) == {"dry_sequence_breakers": ["\n", "x"]}
    assert given(dry_sequence_breakers=[""]) == {"dry_sequence_breakers": []}
    assert given(stop=["a", "b"], banned_tokens=[5]) == {"stop": ["a", "b"], "banned_tokens": [5]}


@pytest.mark.parametrize("name", ["grammar", "json_schema"])
def test_texts_may_be_in_files(tmp_path: Path, name: str):
    (tmp_path / "text").write_bytes(b"one\r\ntwo")
    files: dict[str, object] = {f"{name}_file": tmp_path / "text"}
    assert given(**files) == {name: "one\ntwo"}
    with pytest.raises(UsageError, match="exclude each other"):
        given(**files, **{name: "three"})
    with pytest.raises(UsageError, match=f"cannot read the {name.replace('_', ' ')}"):
        given(**{f"{name}_file": tmp_path / "no"})


@pytest.mark.parametrize("texts", [["12"], ["=1"], ["x=1"], ["1=x"], ["-1=1"], ["1=1", "1=2"]])
def test_biases_that_are_refused(texts: list[str]):
    with pytest.raises(UsageError, match="cannot read the bias of a token"):
        given(logit_bias=texts)


def test_an_order_that_is_refused():
    with pytest.raises(UsageError, match="cannot read the order of samplers"):
        given(sampler_order="top_k")
