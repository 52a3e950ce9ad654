"""A sample of the malformed inputs of `make fuzz`, and its mutations."""

from __future__ import annotations

import json
from random import Random

import pytest

from tests.fuzz.mutations import mutate_bytes, mutate_json, mutate_pickle
from tests.fuzz.targets import TARGETS
from tests.fuzz.variants import run_variant

VARIANTS = 80  # of each target


@pytest.mark.parametrize("target", TARGETS)
def test_variants_are_refused_or_loaded(target: str) -> None:
    outcomes = [run_variant(target, seed=7, number=n) for n in range(VARIANTS)]
    assert [outcome.detail for outcome in outcomes if outcome.kind == "failed"] == []
    assert {outcome.kind for outcome in outcomes} == {"refused", "loaded"}


@pytest.mark.parametrize(
    ("mutate", "seed"),
    [
        (mutate_json, {"a": [1, 2.5, "text", None, {"b": True}], "c": {}}),
        (mutate_bytes, b"some bytes"),
        (mutate_pickle, b"\x80\x02}X\x01\x00\x00\x00aK\x01s."),
    ],
)
def test_mutations_are_many_and_repeatable(mutate, seed) -> None:
    found = [mutate(seed, Random(n)) for n in range(200)]
    assert found == [mutate(seed, Random(n)) for n in range(200)]
    assert len(set(found)) > 100


def test_mutations_do_not_change_their_input() -> None:
    seed = {"a": [1, {"b": 2}]}
    for n in range(50):
        mutate_json(seed, Random(n))
    assert json.dumps(seed) == '{"a": [1, {"b": 2}]}'
