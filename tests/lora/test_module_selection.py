"""Only the modules that PEFT would adapt are adapted."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import mtj_loader
from mtj_loader.errors import AdapterError, AdapterMismatchError
from mtj_loader.lora.adapter import read_config
from tests.support import neox
from tests.support.adapters import CONFIG, linear, write_adapter

MODULES = (
    "gpt_neox.layers.0.attention.query_key_value",
    "gpt_neox.layers.1.attention.query_key_value",
    "gpt_neox.layers.1.attention.dense",
    "model.layers.1.block_sparse_moe.experts.0.w1",
    "dense",
)
# Settings → the modules above that are adapted.
CASES = {
    "name": ({"target_modules": ["dense"]}, (2, 4)),
    "part of a name": ({"target_modules": ["ense"]}, ()),
    "end of a path": ({"target_modules": ["attention.dense"]}, (2,)),
    "several": ({"target_modules": ["w1", "query_key_value"]}, (0, 1, 3)),
    "expression": ({"target_modules": r".*\.(dense|w1)"}, (2, 3)),
    "expression of a part": ({"target_modules": "dense"}, (4,)),
    "all linear": ({"target_modules": "all-linear"}, (0, 1, 2, 3, 4)),
    "excluded": (
        {"target_modules": ["dense", "w1"], "exclude_modules": ["attention.dense"]},
        (3, 4),
    ),
    "excluded by expression": (
        {"target_modules": ["dense", "w1"], "exclude_modules": r".*experts.*"},
        (2, 4),
    ),
    "all linear is no word for exclusions": (
        {"target_modules": ["dense"], "exclude_modules": "all-linear"},
        (2, 4),
    ),
    "layers": (
        {"target_modules": ["query_key_value", "w1"], "layers_to_transform": [1]},
        (1, 3),
    ),
    "a layer": ({"target_modules": ["query_key_value", "dense"], "layers_to_transform": 0}, (0, 4)),
    "no layers": ({"target_modules": ["query_key_value"], "layers_to_transform": []}, (0, 1)),
}
CASE_LIST = pytest.mark.parametrize(("settings", "adapted"), CASES.values(), ids=CASES)


@CASE_LIST
def test_selection(settings: dict, adapted: tuple[int, ...]) -> None:
    modules = read_config(CONFIG | settings, file="adapter_config.json").modules
    assert tuple(i for i, name in enumerate(MODULES) if modules.includes(name)) == adapted


@pytest.mark.parity
@pytest.mark.parametrize(
    "case", sorted(CASES.keys() - {"all linear"})
)  # PEFT expands that one elsewhere
def test_selection_in_peft(case: str) -> None:
    settings, adapted = CASES[case]
    peft = importlib.import_module("peft")
    check = importlib.import_module("peft.tuners.tuners_utils").check_target_module_exists
    config = peft.LoraConfig(**settings)
    assert tuple(i for i, name in enumerate(MODULES) if check(config, name)) == adapted


def test_tensors_that_peft_would_ignore_are_refused(tmp_path: Path) -> None:
    base = neox.write(tmp_path / "base")
    terms = linear(MODULES[0], 72, 24) | linear(MODULES[2], 24, 24)
    adapter = write_adapter(tmp_path / "adapter", terms, target_modules=["dense"])
    with pytest.raises(AdapterMismatchError, match="PEFT ignores this tensor") as caught:
        mtj_loader.plan(base, "mp=1", adapter=adapter)
    [problem] = caught.value.problems
    assert MODULES[0] in str(problem.tensor)


def test_an_expression_that_cannot_be_matched_selects_all() -> None:
    settings = CONFIG | {"target_modules": r"^(?!.*vision).*dense"}
    modules = read_config(settings, file="adapter_config.json").modules
    assert modules.includes(MODULES[2])


def test_an_expression_that_cannot_be_matched_excludes_nothing() -> None:
    settings = {"target_modules": ["dense"], "exclude_modules": r"gpt_neox\.layers\.(?=5).*"}
    modules = read_config(CONFIG | settings, file="adapter_config.json").modules
    assert modules.includes(MODULES[2])


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": [1]},
        {"target_modules": {}},
        {"exclude_modules": 3},
        {"layers_to_transform": ["1"]},
        {"layers_to_transform": True},
        {"layers_to_transform": [1], "layers_pattern": "blocks"},
    ],
    ids=str,
)
def test_malformed_settings(settings: dict) -> None:
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        read_config(CONFIG | settings, file="adapter_config.json")
