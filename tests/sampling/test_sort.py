"""The sorting network against numpy's sort."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mtj_loader.sampling.sort import sort_descending


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65, 300])
def test_sorts_as_numpy(size: int):
    rng = np.random.default_rng(size)
    x = rng.normal(size=(20, size)).astype(np.float32)
    x[::3] = np.round(x[::3])  # ties
    x[1::4][rng.random(x[1::4].shape) < 0.5] = -np.inf
    assert np.array_equal(jax.jit(sort_descending)(x), -np.sort(-x, axis=1))
