"""The random draw, over vocabularies of one to three groups of blocks."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mtj_loader.sampling.draw import LEVELS, draw, uniforms

draw_jitted = jax.jit(draw)


def test_frequencies_over_all_levels():
    vocab_size, rows = 8200, 3000
    tokens, parts = [0, 127, 128, 4095, 4096, 8199], np.array([1, 2, 3, 1, 2, 3])
    weights = np.zeros((rows, vocab_size), np.float32)
    weights[:, tokens] = parts * 1e-3
    uniform = np.random.default_rng(0).uniform(size=(rows, LEVELS)).astype(np.float32)
    found = np.bincount(draw_jitted(weights, uniform), minlength=vocab_size) / rows
    assert np.allclose(found[tokens], parts / 12, atol=0.032)  # four standard deviations
    assert np.isclose(found[tokens].sum(), 1)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 0.5])
def test_only_tokens_with_a_weight_are_drawn(uniform: float):
    rng = np.random.default_rng(1)
    weights = rng.exponential(size=(64, 300)) * 10.0 ** rng.integers(-38, 30, size=(64, 300))
    weights = np.where(rng.random((64, 300)) < 0.9, 0, weights).astype(np.float32)
    weights[0] = 0
    weights[0, 299] = 1e-30
    tokens = draw_jitted(weights, np.full((64, LEVELS), uniform, np.float32))
    assert (weights[np.arange(64), tokens] > 0).all()
    if uniform == 0:
        assert np.array_equal(tokens, np.argmax(weights > 0, axis=1))


def test_streams_depend_on_the_key_and_the_step_only():
    keys = np.array([[0, 1], [1, 0], [0, 1], [0, 1]], np.uint32)
    steps = np.array([5, 5, 6, 5], np.int32)
    numbers = np.asarray(jax.jit(uniforms, static_argnums=2)(keys, steps, 4))
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert np.array_equal(numbers[0], numbers[3])
    assert len(np.unique(numbers)) == 12
