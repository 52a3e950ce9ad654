"""The settings' checks, and their arrays."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mtj_loader.errors import UsageError
from mtj_loader.sampling.params import SamplingParams
from mtj_loader.sampling.row_settings import bitmask, neutral_rows, row_settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", -1),
        ("max_new_tokens", 2**31),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_k", 1.0),
        ("top_k", True),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("min_p", 2),
        ("tfs", 1.5),
        ("typical_p", -1),
        ("top_a", -1),
        ("repetition_penalty", 0),
        ("repetition_penalty_range", -1),
        ("repetition_penalty_curve", "linear"),
        ("presence_penalty", None),
        ("xtc_threshold", 1.01),
        ("dry_allowed_length", -1),
        ("dry_sequence_breakers", "\n"),
        ("dry_sequence_breakers", ["\n"]),
        ("mirostat", 1),
        ("mirostat", True),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", [1]),
        ("logit_bias", dict.fromkeys(range(513), 1.0)),
        ("banned_tokens", [-1]),
        ("banned_tokens", 5),
        ("ban_eos", 1),
        ("sampler_order", [0, 1, 2]),
        ("sampler_order", [6, 6, 0, 1, 2, 3, 4]),
        ("sampler_order", [6, 5, 0, 1, 2, 3, 4, 7]),
        ("sampler_order", "6501234"),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", [1]),
        ("logprobs", 21),
    ],
)
def test_values_out_of_range(name: str, value: object):
    with pytest.raises(UsageError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.key == name


def test_numpy_numbers_are_fine():
    params = SamplingParams(top_k=np.int64(3), temperature=np.float32(0.5), seed=np.uint64(5))
    row_settings(params, vocab_size=9, eos_ids=[])


def test_an_order_without_penalties_gets_them_in_front():
    assert SamplingParams(sampler_order=[5, 4, 3, 2, 1, 0]).sampler_order == (6, 5, 4, 3, 2, 1, 0)


@pytest.mark.parametrize("name", ["banned_tokens", "dry_sequence_breakers"])
def test_ids_outside_the_vocabulary(name: str):
    with pytest.raises(UsageError, match=name):
        row_settings(SamplingParams(**{name: [0, 7]}), vocab_size=7, eos_ids=[])
    with pytest.raises(UsageError, match="logit_bias"):
        row_settings(SamplingParams(logit_bias={7: 1.0}), vocab_size=7, eos_ids=[])


def test_only_samplers_that_run_are_stages():
    def stages(**settings: object) -> list[int]:
        row = row_settings(SamplingParams(**settings), vocab_size=50, eos_ids=[])
        return [stage for stage in row.stages.tolist() if stage >= 0]

    assert stages() == [5]
    assert stages(temperature=1, top_k=50) == []
    assert stages(top_k=3, top_p=0.5, presence_penalty=1) == [6, 5, 0, 2]
    assert stages(top_k=3, min_p=0.5, sampler_order=[2, 0, 5, 6, 1, 3, 4]) == [2, 0, 5]
    assert stages(temperature=0, top_k=3) == []
    assert stages(temperature=0, top_k=3, frequency_penalty=1) == [6]
    assert stages(mirostat=2, top_k=3, sampler_order=[5, 6, 0, 1, 2, 3, 4]) == [5]
    assert stages(mirostat=2, tfs=0.5, repetition_penalty=1.1) == [6, 5]


def test_rows_fit_the_arrays_of_all_rows():
    rows = neutral_rows(3, vocab_size=70)
    params = SamplingParams(logit_bias={5: -1.5}, banned_tokens=[0, 69], seed=2**40 + 3)
    row = row_settings(params, vocab_size=70, eos_ids=[2, 500])  # an id the model does not have
    for array, value in zip(jax.tree.leaves(rows), jax.tree.leaves(row), strict=True):
        assert array.shape == (3, *value.shape)
        assert array.dtype == value.dtype
        array[1] = value
    assert rows.greedy.tolist() == [True, False, True]
    assert rows.key.tolist() == [[0, 0], [256, 3], [0, 0]]
    assert (rows.bias_ids[1, 0], rows.bias_values[1, 0], rows.bias_ids[1, 1]) == (5, -1.5, 70)
    assert rows.banned[1].tolist() == bitmask([0, 69], 70).tolist() == [1, 0, 1 << 5]
    assert rows.eos[1].tolist() == [4, 0, 0]
    assert rows.initial_mu.tolist() == [10, 10, 10]
