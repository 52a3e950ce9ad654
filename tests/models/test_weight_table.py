"""Every family's map against its parameter table: one row per weight, in both or in neither."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest

from mtj_loader.formats import hf_config
from mtj_loader.models import FAMILIES, family, parameters
from mtj_loader.models.config import ModelConfig
from mtj_loader.parameters import ParamSpec
from mtj_loader.weights.map_reader import find_map
from tests.oracle import neox_cases
from tests.parity.cases import CASES
from tests.support.mpt_options import MPT_OPTIONS

Key = tuple[str, str]  # module with {layer}, parameter


def settings_of(model_type: str) -> list[dict[str, Any]]:
    """Configs that together use every option of the family."""
    if model_type == "gpt_neox":
        return list(neox_cases.CASES.values())
    extra = MPT_OPTIONS.values() if model_type == "mpt" else []
    return [*CASES[model_type].values(), *extra]


def read(model_type: str, settings: dict[str, Any]) -> ModelConfig:
    normal = hf_config.normalize({**settings, "model_type": model_type}, file="config.json")
    return family(model_type).Config.read(normal, file="config.json")


def key_of(spec: ParamSpec) -> Key:
    return re.sub(r"layer_\d+/", "layer_{layer}/", spec.module), spec.param


@functools.cache
def declared(model_type: str, transposed_linear: bool = False) -> dict[Key, ParamSpec]:
    """Every parameter that some config of the family has."""
    return {
        key_of(spec): spec
        for settings in settings_of(model_type)
        for spec in parameters(read(model_type, settings), 2, transposed_linear)
    }


def mapped(model_type: str) -> dict[Key, frozenset[str]]:
    """Every parameter that the map fills from a tensor, and the transforms."""
    weight_map = find_map(model_type)
    entries = [*weight_map.static.values(), *weight_map.layer.values()]
    return {target.key: target.transforms for targets in entries for target in targets}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_map_and_model_have_the_same_parameters(model_type: str) -> None:
    zeros = {target.key for target in find_map(model_type).zero_weights}
    assert mapped(model_type).keys() | zeros == declared(model_type).keys()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_only_vocabularies_are_padded(model_type: str) -> None:
    padded = {key for key, transforms in mapped(model_type).items() if "vocab_pad" in transforms}
    assert padded == {key for key, spec in declared(model_type).items() if spec.split == "V"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_only_biases_of_row_parallel_layers_are_divided(model_type: str) -> None:
    specs = declared(model_type)
    divided = {key for key, names in mapped(model_type).items() if "divide_by_shards" in names}
    zeros = {target.key for target in find_map(model_type).zero_weights}
    whole_biases = {k for k, spec in specs.items() if k[1] == "b" and spec.split is None}
    assert divided == whole_biases - zeros


@pytest.mark.parametrize("model_type", FAMILIES)
def test_only_linear_weights_are_transposed(model_type: str) -> None:
    """`no_transpose` is on the matrices that `transposed_linear` leaves alone."""
    plain, transposed = declared(model_type), declared(model_type, transposed_linear=True)
    kept = {k for k, transforms in mapped(model_type).items() if "no_transpose" in transforms}
    matrices = {k for k, spec in plain.items() if len(spec.shape) > 1}
    assert kept == {k for k in matrices if plain[k].groups == transposed[k].groups}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_maps_find_values_under_standard_and_old_names(model_type: str) -> None:
    """A map may ask for a setting by any of its names, whichever one config.json uses."""
    config_type, weight_map = family(model_type).Config, find_map(model_type)
    for settings in settings_of(model_type):
        config = read(model_type, settings)
        normal = hf_config.normalize(settings, file="config.json")
        spelled = hf_config.add_spellings(normal, config_type.spellings)
        values = weight_map.config_values(spelled, file="config.json")
        assert {k: getattr(config, k, v) for k, v in values.items()} == values
        for name, others in config_type.spellings.items():
            assert len({repr(spelled.get(other)) for other in (name, *others)}) == 1
