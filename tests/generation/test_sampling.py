"""Sampling, against a plain numpy reference and against frequencies."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtj_loader.errors import UsageError
from mtj_loader.generation.sampling import (
    NOT_FINITE,
    SamplingParams,
    filter_top_k_top_p,
    make_sampler,
    sample,
)

INF = np.inf
keep = jax.jit(filter_top_k_top_p)
choose = jax.jit(sample)


def draw(logits, *, step=0, seeds=None, **params) -> list[int]:
    logits = np.asarray(logits, np.float32)
    chosen = SamplingParams(**params)
    sampler = make_sampler(chosen, seeds or chosen.seeds(len(logits)), logits.shape[-1])
    return choose(logits, np.int32(step), sampler).tolist()


def reference_keep(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """One row, token by token from the likeliest down; ties by the smaller id."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = [i for i in order if logits[i] >= logits[order[top_k - 1]]]
    weights = np.exp(logits[order].astype(np.float64))
    weights /= weights.sum()
    kept, mass = [], 0.0
    for i, weight in zip(order, weights, strict=True):
        if kept and mass >= top_p and top_p < 1:
            break
        kept.append(i)
        mass += weight
    result = np.full_like(logits, -INF)
    result[kept] = logits[kept]
    return result


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [  # probabilities 1/8, 1/2, 1/8, 1/4
        (4, 1.0, [0, 1, 2, 3]),
        (1, 1.0, [1]),
        (2, 1.0, [1, 3]),
        (3, 1.0, [0, 1, 2, 3]),  # tied with the third
        (4, 0.5, [1]),  # exactly enough
        (4, 0.51, [1, 3]),
        (4, 0.75, [1, 3]),
        (4, 0.76, [0, 1, 3]),  # of two tied the smaller id
        (4, 0.99, [0, 1, 2, 3]),
        (4, 1e-30, [1]),  # at least one
        (2, 0.66, [1]),  # of what top-k leaves, the first has 2/3
        (2, 0.67, [1, 3]),
    ],
)
def test_what_top_k_and_top_p_keep(top_k: int, top_p: float, expected: list[int]):
    logits = np.log2(np.array([[1, 4, 1, 2]], np.float32)) * np.log(2).astype(np.float32)
    kept = keep(logits, np.int32(top_k), np.float32(top_p))
    assert np.flatnonzero(np.isfinite(kept[0])).tolist() == expected
    assert np.array_equal(kept[0][jnp.array(expected)], logits[0][expected])


def test_top_p_of_one_keeps_what_rounding_would_lose():
    logits = np.array([[0, -20, -20, -21]], np.float32)  # before the second they sum to 1 - 2e-9
    kept = keep(logits, np.int32(2), np.float32(1))
    assert np.isfinite(kept).tolist() == [[True, True, True, False]]


@given(
    st.lists(st.integers(-9, 9), min_size=7, max_size=7),
    st.integers(1, 7),
    st.sampled_from([0.05, 0.3, 0.62, 0.9, 0.999, 1.0]),
)
def test_top_k_and_top_p_equal_the_reference(halves: list[int], top_k: int, top_p: float):
    logits = np.array(halves, np.float32) / 2  # ties are common
    kept = keep(logits[None], np.int32(top_k), np.float32(top_p))[0]
    assert np.array_equal(kept, reference_keep(logits, top_k, top_p))


def test_greedy_takes_the_first_of_the_largest():
    assert draw([[0, 3, 3, 1], [-INF, -5, -9, -5]], temperature=0) == [1, 1]
    assert make_sampler(SamplingParams(temperature=0), [0], 4) is None


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [[0, np.nan, 1], [0, INF, 1], [-INF, -INF, -INF]])
def test_logits_that_are_not_finite_are_marked(bad: list[float], temperature: float):
    assert draw([bad, [0, 0, 99]], temperature=temperature) == [NOT_FINITE, 2]


@pytest.mark.parametrize("temperature", [1e-45, 2e-38, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float):
    assert draw([[1e4, 3e4, -3e4, 2e4]] * 8, temperature=temperature, seeds=range(8)) == [1] * 8


def test_a_huge_temperature_is_uniform():
    tokens = draw([[0, 5, -5]] * 3000, temperature=1e300, seeds=range(3000))
    assert np.allclose(np.bincount(tokens) / 3000, 1 / 3, atol=0.04)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"temperature": 1.0}, [1 / 8, 4 / 8, 1 / 8, 2 / 8]),
        ({"temperature": 0.5}, [1 / 22, 16 / 22, 1 / 22, 4 / 22]),
        ({"temperature": 1.0, "top_k": 2}, [0, 4 / 6, 0, 2 / 6]),
        ({"temperature": 1.0, "top_p": 0.8}, [1 / 7, 4 / 7, 0, 2 / 7]),
        ({"temperature": 0.5, "top_p": 0.9}, [0, 16 / 20, 0, 4 / 20]),  # temperature comes first
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),  # 2/3 is enough
        ({"temperature": 1.0, "top_k": 99}, [1 / 8, 4 / 8, 1 / 8, 2 / 8]),
    ],
)
def test_frequencies(params: dict, expected: list[float]):
    rows = 8000
    logits = np.tile(np.log(np.array([1, 4, 1, 2])), (rows, 1))
    tokens = draw(logits, seeds=range(rows), **params)
    found = np.bincount(tokens, minlength=4) / rows
    assert np.allclose(found, expected, atol=0.02)  # four standard deviations of 8000 draws
    assert (found[np.array(expected) == 0] == 0).all()


def test_steps_of_one_row_are_independent_draws():
    logits = np.zeros((1, 4), np.float32)
    sampler = make_sampler(SamplingParams(temperature=1), [7], 4)
    pairs = [(int(choose(logits, s, sampler)[0]), s) for s in np.arange(600, dtype=np.int32)]
    tokens = np.array([token for token, _ in pairs])
    assert np.allclose(np.bincount(tokens) / 600, 0.25, atol=0.08)
    followed = np.bincount(tokens[:-1] * 4 + tokens[1:], minlength=16) / 599
    assert np.allclose(followed, 1 / 16, atol=0.05)


def test_a_row_does_not_depend_on_its_batch():
    logits = np.random.default_rng(0).normal(size=(5, 300)).astype(np.float32)
    seeds, params = [3, 2**64 - 1, 3, 2**32, 0], {"temperature": 1.3, "top_p": 0.9, "top_k": 50}
    together = draw(logits, step=11, seeds=seeds, **params)
    alone = [
        draw(logits[i : i + 1], step=11, seeds=seeds[i : i + 1], **params)[0] for i in range(5)
    ]
    assert together == alone


def test_all_64_bits_of_a_seed_count():
    logits = np.zeros((4, 100_000), np.float32)
    assert len(set(draw(logits, temperature=1, seeds=[1, 2, 1 + 2**32, 1 + 2**63]))) == 4


def test_the_stream_of_a_seed_is_that_of_jax():
    key = jax.random.fold_in(jax.random.key(5, impl="threefry2x32"), 3)
    logits = np.zeros((1, 1000), np.float32)
    assert draw(logits, temperature=1, seed=5, step=3) == [
        int(jnp.argmax(jax.random.gumbel(key, (1000,))))
    ]


def test_other_values_compile_nothing_again():
    traced = []

    @jax.jit
    def counted(logits, step, sampler):
        traced.append(1)
        return sample(logits, step, sampler)

    for params in (
        SamplingParams(temperature=0.1, seed=4),
        SamplingParams(temperature=1.9, top_k=3),
        SamplingParams(top_p=0.5),
    ):
        counted(np.zeros((2, 9), np.float32), np.int32(1), make_sampler(params, [1, 2], 9))
    assert len(traced) == 1
    greedy = jax.make_jaxpr(sample)(np.zeros((2, 9), np.float32), np.int32(1), None)
    assert "sort" not in str(greedy)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -0.1}, r"temperature is out of range.*finite number, 0 or more.*-0.1"),
        ({"temperature": float("nan")}, "temperature is out of range"),
        ({"temperature": INF}, "temperature is out of range"),
        ({"temperature": "1"}, "temperature is out of range"),
        ({"temperature": True}, "temperature is out of range"),
        ({"top_k": -1}, "top_k is out of range.*an integer, 0 or more.*-1"),
        ({"top_k": 1.5}, "top_k is out of range"),
        ({"top_p": 0}, "top_p is out of range.*over 0, at most 1.*0"),
        ({"top_p": 1.01}, "top_p is out of range"),
        ({"seed": -1}, "seed is out of range.*0 to 18446744073709551615.*-1"),
        ({"seed": 2**64}, "seed is out of range"),
        ({"seed": [1, 2.0]}, "seed is out of range"),
        ({"seed": "1"}, "seed is out of range"),
        ({"seed": None}, "seed is out of range"),
        ({"max_new_tokens": 0}, "max_new_tokens is out of range.*1 to 2147483647.*0"),
        ({"max_new_tokens": 10**5000}, "max_new_tokens is out of range.*too long to print"),
        ({"seed": 10**5000}, "seed is out of range.*too long to print"),
        ({"temperature": 10**400}, "temperature is out of range"),
        ({"top_p": Fraction(10**5000, 3)}, "top_p is out of range.*Fraction"),
        ({"max_new_tokens": True}, "max_new_tokens is out of range"),
    ],
)
def test_values_out_of_range_are_refused(params: dict, message: str):
    with pytest.raises(UsageError, match=f"(?s){message}"):
        SamplingParams(**params)


def test_numpy_numbers_are_numbers():
    params = SamplingParams(
        np.int64(3), np.float32(0.5), np.int32(2), np.float64(0.5), np.uint64(7)
    )
    assert params.seeds(2) == [7, 7]


def test_one_seed_or_one_per_prompt():
    assert SamplingParams(seed=5).seeds(3) == [5, 5, 5]
    assert SamplingParams(seed=[5, 6]).seeds(2) == [5, 6]
    with pytest.raises(UsageError, match=r"(?s)differ in length.*3 seeds, or one integer.*2"):
        SamplingParams(seed=[5, 6]).seeds(3)
