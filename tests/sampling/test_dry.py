"""DRY against the plain reference."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mtj_loader.sampling.dry import penalize_sequences
from mtj_loader.sampling.params import SamplingParams
from tests.sampling import reference
from tests.sampling.rows import pad, stack

V, T = 9, 40
ROWS = 200
penalize = jax.jit(penalize_sequences)


def found(params: list[SamplingParams], histories: list[list[int]]) -> np.ndarray:
    """What is subtracted from each logit, [b, V]."""
    settings = stack(params, V, ROWS)
    logits = np.zeros((ROWS, V), np.float32)
    arrays = pad(histories, ROWS, T)
    rows = settings.dry_multiplier > 0
    return -np.asarray(penalize(logits, rows, *arrays, settings))


@pytest.mark.parametrize(
    ("history", "breakers", "expected"),
    [
        ([1, 2, 3, 4, 1, 2, 3], [], {4: 2.0}),  # 3 tokens, one over the allowed 2
        ([1, 2, 3, 4, 1, 2], [], {3: 1.0}),
        ([1, 2, 3, 4, 5, 2], [], {}),  # only one token
        ([1, 2, 3, 4, 1, 2, 3], [2], {}),
        ([1, 2, 3, 4, 1, 2, 3], [1], {4: 1.0}),
        ([1, 2, 3, 4, 1, 2, 3], [4], {4: 2.0}),  # the penalized token may be a breaker
        ([1, 2, 3, 0, 2, 3, 5, 1, 2, 3], [], {0: 2.0, 5: 1.0}),
        ([1, 1, 1, 1], [], {1: 2.0}),
        ([], [], {}),
        ([3], [], {}),
    ],
)
def test_what_is_penalized(history: list[int], breakers: list[int], expected: dict):
    settings = SamplingParams(dry_multiplier=1, dry_base=2, dry_sequence_breakers=breakers)
    penalties = found([settings], [history])[0]
    assert {i: x for i, x in enumerate(penalties.tolist()) if x} == pytest.approx(expected)


def test_random_histories_equal_the_reference():
    rng = np.random.default_rng(0)
    params = [
        SamplingParams(
            dry_multiplier=rng.choice([0, 0.8, 2]),
            dry_base=rng.choice([0.9, 1, 1.75, 3]),
            dry_allowed_length=int(rng.integers(0, 5)),
            dry_range=int(rng.choice([0, 1, 5, 20, 99])),
            dry_sequence_breakers=rng.choice(V, size=rng.integers(0, 2)).tolist(),
        )
        for _ in range(ROWS)
    ]
    histories = [
        rng.integers(0, rng.integers(1, V + 1), size=rng.integers(0, T + 1)).tolist()
        for _ in range(ROWS)
    ]
    penalties = found(params, histories)
    for row in range(ROWS):
        expected = -reference.dry(np.zeros(V), params[row], histories[row])
        assert np.allclose(penalties[row], expected, rtol=1e-4), (params[row], histories[row])


def test_a_long_repetition_stays_finite():
    settings = SamplingParams(dry_multiplier=1e300, dry_base=1e30)
    penalties = found([settings], [[1] * T])
    assert np.isfinite(penalties).all()
    assert penalties[0, 1] > 1e9
