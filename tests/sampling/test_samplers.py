"""Each sampler, alone and in every order, against the plain reference."""

from __future__ import annotations

from itertools import permutations

import jax
import numpy as np
import pytest

from mtj_loader.sampling.params import SamplingParams
from mtj_loader.sampling.truncation import exclude_top_choices, keep_below_surprise
from tests.sampling import reference
from tests.sampling.rows import (
    CHAIN_ROWS,
    CHAIN_TIME,
    CHAIN_VOCAB,
    apply_jitted,
    pad,
    run_chain,
    stack,
)

INF = np.inf
V, T = CHAIN_VOCAB, CHAIN_TIME
ROWS = CHAIN_ROWS

SINGLE = {
    "top_k": [1, 3, V, 99],
    "top_p": [0.0, 1e-30, 0.3, 0.9, 0.999],
    "min_p": [1e-3, 0.1, 1.0],
    "top_a": [1e-3, 0.2, 0.9, 50.0],
    "tfs": [0.0, 0.3, 0.9, 0.99],
    "typical_p": [0.0, 0.2, 0.7, 0.97],
    "temperature": [1e-6, 0.3, 2.0, 1e300],
    "top_n_sigma": [0.5, 1.0, 2.0],
    "dynatemp_range": [0.3, 0.7, 3.0],
    "smoothing_factor": [0.1, 1.5],
    "repetition_penalty": [0.7, 1.3],
    "presence_penalty": [-0.5, 1.1],
    "frequency_penalty": [-0.3, 0.4],
}


def random_logits(rows: int, seed: int) -> np.ndarray:
    """Rows of all kinds: spread out, with ties, with tokens that are out, with only one left."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, V)) * rng.choice([0.3, 1, 4], size=(rows, 1))
    logits[::4] = np.round(logits[::4])
    logits[1::4][rng.random(logits[1::4].shape) < 0.4] = -INF
    logits[3::16, 1:] = -INF
    logits[np.all(logits == -INF, axis=1), 2] = 0.5
    return logits.astype(np.float32)


def random_histories(rows: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, size=rng.integers(0, T + 1)).tolist() for _ in range(rows)]


def check(logits: np.ndarray, params: list[SamplingParams], histories: list[list[int]]) -> None:
    found = run_chain(logits, params, histories)
    for row in range(len(params)):
        expected = reference.chain(logits[row], params[row], histories[row])
        where = f"row {row}: {params[row]}, logits {logits[row]}, history {histories[row]}"
        assert np.array_equal(found[row] > -INF, expected > -INF), where
        assert np.allclose(found[row], expected, rtol=2e-5, atol=2e-5), where


@pytest.mark.parametrize("name", SINGLE)
def test_each_sampler_alone(name: str):
    values = SINGLE[name]
    settings = [{"temperature": 1.0} | {name: values[i % len(values)]} for i in range(ROWS)]
    params = [SamplingParams(**chosen) for chosen in settings]
    check(random_logits(ROWS, 1), params, random_histories(ROWS, 2))


def test_settings_of_dynamic_temperature_smoothing_and_penalties():
    rng = np.random.default_rng(3)
    params = [
        SamplingParams(
            temperature=rng.uniform(0.2, 2),
            dynatemp_range=rng.choice([0, 0.5, 2]),
            dynatemp_exponent=rng.choice([0, 0.5, 1, 2.5]),
            smoothing_factor=rng.choice([0, 0.4]),
            smoothing_curve=rng.choice([1, 2, 3.5]),
            top_n_sigma=rng.choice([0, 1.2]),
            repetition_penalty=rng.choice([0.8, 1, 1.5]),
            repetition_penalty_range=int(rng.choice([0, 1, 2, 7, T, 99])),
            repetition_penalty_slope=rng.choice([0, 0.3, 1, 4]),
            repetition_penalty_curve=str(rng.choice(["kobold", "koboldcpp"])),
            presence_penalty=rng.choice([0, 0.3]),
            frequency_penalty=rng.choice([0, 0.2]),
            sampler_order=rng.permutation(7).tolist(),
        )
        for _ in range(ROWS)
    ]
    check(random_logits(ROWS, 4), params, random_histories(ROWS, 5))


def test_every_order():
    orders = list(permutations(range(7)))
    params = [
        SamplingParams(
            temperature=0.7,
            top_k=8,
            top_a=0.02,
            top_p=0.93,
            min_p=0.03,
            tfs=0.95,
            typical_p=0.9,
            repetition_penalty=1.4,
            repetition_penalty_range=5,
            sampler_order=order,
        )
        for order in orders
    ]
    rng = np.random.default_rng(6)
    logits = np.tile(rng.normal(size=V) * 2, (len(orders), 1)).astype(np.float32)
    check(logits, params, [[3, 1, 4, 1, 5, 9, 2, 6]] * len(orders))


def test_a_larger_vocabulary():
    rng = np.random.default_rng(13)
    size, settings = 2000, ["top_k", "top_p", "min_p", "top_a", "tfs", "typical_p", "top_n_sigma"]
    values = [50, 0.9, 0.02, 0.1, 0.9, 0.7, 1.5]
    params = [
        SamplingParams(temperature=1.0, **{name: value})
        for name, value in zip(settings, values, strict=True)
    ]
    logits = rng.normal(size=(len(params), size)).astype(np.float32) * 3
    arrays = pad([], len(params), CHAIN_TIME)
    found = np.asarray(apply_jitted(logits, *arrays, stack(params, size)))
    for i, row in enumerate(params):
        expected = reference.chain(logits[i], row, [])
        assert 1 < (expected > -INF).sum() < size, settings[i]
        assert np.allclose(found[i], expected, rtol=1e-6), settings[i]


def test_xtc_and_mirostat_equal_the_reference():
    rng = np.random.default_rng(11)
    logits, rows = random_logits(ROWS, 12), np.ones(ROWS, bool)
    thresholds = rng.choice([0, 0.05, 0.1, 0.3, 0.5, 0.9], size=ROWS)
    params = [SamplingParams(xtc_threshold=t, xtc_probability=1.0) for t in thresholds]
    uniform, mu = np.zeros(ROWS, np.float32), rng.uniform(-1, 8, size=ROWS).astype(np.float32)
    without = jax.jit(exclude_top_choices)(logits, rows, uniform, stack(params, V))
    likely = jax.jit(keep_below_surprise)(logits, rows, mu)
    for i, row in enumerate(logits.astype(np.float64)):
        assert np.array_equal(without[i], reference.xtc(row, thresholds[i])), (i, row)
        assert np.array_equal(likely[i], reference.mirostat(row, mu[i])), (i, row)


def test_neutral_settings_change_nothing():
    logits = random_logits(ROWS, 7) * 1e4
    params = [SamplingParams(temperature=1.0)] * ROWS
    assert np.array_equal(run_chain(logits, params, random_histories(ROWS, 8)), logits)


def test_rows_without_a_sampler_keep_their_logits():
    logits = random_logits(ROWS, 9)
    everything = SamplingParams(
        top_k=2, top_a=0.5, top_p=0.5, min_p=0.5, tfs=0.5, typical_p=0.5, presence_penalty=1
    )
    params = [everything, SamplingParams(temperature=1.0)] * (ROWS // 2)
    found = run_chain(logits, params, random_histories(ROWS, 10))
    assert np.array_equal(found[1::2], logits[1::2])
    assert not np.array_equal(found[::2], logits[::2])
