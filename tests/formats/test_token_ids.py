"""The ids in config.json and generation_config.json that start and end a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mtj_loader
from mtj_loader.errors import ConfigError
from mtj_loader.formats.token_ids import bos_id, eos_ids
from tests.support import neox


@pytest.mark.parametrize(
    ("config", "generation_config", "expected"),
    [
        ({"eos_token_id": 2}, {}, {2}),
        ({"eos_token_id": 2}, {"eos_token_id": 5}, {5}),
        ({"eos_token_id": 2}, {"eos_token_id": [5, 0]}, {0, 5}),
        ({"eos_token_id": 0}, {"eos_token_id": None}, {0}),
        ({"eos_token_id": None}, {}, set()),
        ({}, {}, set()),
    ],
)
def test_end_of_text_ids(config: dict, generation_config: dict, expected: set):
    assert eos_ids(config, generation_config) == expected


@pytest.mark.parametrize("value", ["2", True, -1, 1.0, [1, None], {"id": 1}])
def test_invalid_end_of_text_ids(value: object):
    with pytest.raises(ConfigError, match="not a token id") as caught:
        eos_ids({"eos_token_id": 0}, {"eos_token_id": value})
    assert (caught.value.file, caught.value.key) == ("generation_config.json", "eos_token_id")
    with pytest.raises(ConfigError) as caught:
        bos_id({"bos_token_id": value}, {})
    assert (caught.value.file, caught.value.key) == ("config.json", "bos_token_id")


def test_start_of_text_id():
    assert bos_id({"bos_token_id": 0}, {}) == 0
    assert bos_id({"bos_token_id": 1}, {"bos_token_id": 3}) == 3
    assert bos_id({"bos_token_id": None}, {}) is None


def test_ids_outside_the_vocabulary_are_warned_about(tmp_path: Path):
    folder = neox.write(tmp_path, eos_token_id=28, bos_token_id=29)  # of 29 tokens
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 29]}))
    assert mtj_loader.plan(folder, "mp=1").warnings == (
        "eos_token_id 29 in generation_config.json is not among the 29 tokens: no text ends there",
        "bos_token_id 29 in config.json is not among the 29 tokens: an empty prompt is rejected",
    )


def test_a_warning_does_not_print_thousands_of_ids(tmp_path: Path):
    folder = neox.write(tmp_path, eos_token_id=list(range(100_000)))
    (warning,) = mtj_loader.plan(folder, "mp=1").warnings
    assert warning.startswith("eos_token_id 29, 30, 31, ")
    assert len(warning) < 300


def test_ids_in_the_vocabulary_cause_no_warning(tmp_path: Path):
    folder = neox.write(tmp_path, eos_token_id=28, bos_token_id=[0, 28], pad_token_id=-1)
    assert mtj_loader.plan(folder, "mp=2").warnings == ()


@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id"])
def test_invalid_ids_are_rejected_when_planning(key: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="not a token id") as caught:
        mtj_loader.plan(neox.write(tmp_path, **{key: "2"}), "mp=1")
    assert caught.value.key == key
