"""Rotary frequencies of every type, by hand; errors in their settings."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mtj_loader.errors import ConfigError
from mtj_loader.formats.config_reader import Reader
from mtj_loader.formats.hf_config import normalize
from mtj_loader.models.layers import rope
from mtj_loader.models.layers.rope_config import read_rope


def read(head_dim=8, max_positions=64, fraction=1.0, **settings):
    config = normalize({"rope_parameters": settings}, file="config.json")
    return read_rope(
        Reader(config, "config.json"),
        head_dim=head_dim,
        max_positions=max_positions,
        fraction=fraction,
    )


LONGROPE = {"rope_type": "longrope", "short_factor": [1, 2, 3, 4], "long_factor": [5, 6, 7, 8]}


def test_default_frequencies():
    frequencies = read(rope_theta=10000.0).frequencies(1)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, [1, 0.1, 0.01, 0.001], rtol=1e-6)


def test_theta_defaults_to_ten_thousand():
    assert read().theta == 10000.0


def test_only_a_fraction_of_the_head_is_rotated():
    np.testing.assert_allclose(
        read(rope_theta=100.0, partial_rotary_factor=0.5).frequencies(1), [1, 0.1], rtol=1e-6
    )


def test_the_family_gives_the_default_fraction():
    assert len(read(fraction=0.25).frequencies(1)) == 1


def test_an_odd_number_of_dimensions_is_rounded_up_to_pairs():
    frequencies = read(head_dim=6, rope_theta=1000.0, partial_rotary_factor=0.5).frequencies(1)
    np.testing.assert_allclose(frequencies, [1, 1000 ** (-2 / 3)], rtol=1e-6)


def test_linear_divides():
    stretched = read(rope_type="linear", factor=4.0).frequencies(1)
    np.testing.assert_allclose(stretched, read().frequencies(1) / 4, rtol=1e-7)


def test_proportional_pairs_the_whole_head():
    frequencies = read(
        rope_type="proportional", rope_theta=10000.0, partial_rotary_factor=0.5, factor=2.0
    ).frequencies(1)
    np.testing.assert_allclose(frequencies, [0.5, 0.05, 0, 0], rtol=1e-6)


def test_dynamic_starts_beyond_the_trained_length():
    dynamic, plain = read(rope_type="dynamic", factor=2.0), read().frequencies(1)
    np.testing.assert_array_equal(dynamic.frequencies(1), plain)
    np.testing.assert_array_equal(dynamic.frequencies(64), plain)
    theta = 10000 * (2 * 100 / 64 - 1) ** (8 / 6)
    expected = [theta ** (-i / 4) for i in range(4)]
    np.testing.assert_allclose(dynamic.frequencies(100), expected, rtol=1e-6)


def test_llama3_by_wavelengths():
    frequencies = read(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=100,
    ).frequencies(1)
    turns = 100 * 0.1 / (2 * math.pi)  # the second pair is in between
    kept = (turns - 1) / 3
    expected = [1, (1 - kept) * 0.1 / 8 + kept * 0.1, 0.01 / 8, 0.001 / 8]
    np.testing.assert_allclose(frequencies, expected, rtol=1e-6)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
    yarn = read(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    # Pair 0 turns 16 / 2π = 2.5 times: between beta_slow 1 and beta_fast 32, so low = 0, high = 1.
    np.testing.assert_allclose(yarn.frequencies(1), [1, 0.1 / 4, 0.01 / 4, 0.001 / 4], rtol=1e-6)
    assert yarn.scale == pytest.approx(0.1 * math.log(4) + 1)


def test_yarn_attention_factor():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert read(**yarn, attention_factor=0.7).scale == 0.7
    expected = (0.1 * 1.5 * math.log(4) + 1) / (0.1 * 0.5 * math.log(4) + 1)
    assert read(**yarn, mscale=1.5, mscale_all_dim=0.5).scale == pytest.approx(expected)
    assert read(**{**yarn, "factor": 1.0}).scale == 1.0


def test_longrope_chooses_by_the_length_of_the_row():
    longrope = read(**LONGROPE, original_max_position_embeddings=16)
    plain = read().frequencies(1)
    np.testing.assert_allclose(longrope.frequencies(16), plain / [1, 2, 3, 4], rtol=1e-6)
    np.testing.assert_allclose(longrope.frequencies(17), plain / [5, 6, 7, 8], rtol=1e-6)
    assert longrope.scale == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))


def test_a_table_has_a_row_for_each_total():
    dynamic = read(rope_type="dynamic", factor=2.0)
    table = rope.frequency_table(dynamic, [10, 100, 10])
    assert table.shape == (3, 4)
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table[0], table[2])
    np.testing.assert_array_equal(table[1], dynamic.frequencies(100))


@pytest.mark.parametrize(
    ("settings", "key", "wording"),
    [
        (
            {"rope_type": "ntk"},
            "rope_type",
            "linear, dynamic, llama3, yarn, longrope, proportional",
        ),
        ({"rope_type": "linear"}, "factor", "a required setting is missing"),
        ({"rope_type": "linear", "factor": 0}, "factor", "a number above 0"),
        ({"rope_type": "linear", "factor": True}, "factor", "found: true"),
        ({"rope_theta": 1}, "rope_theta", "a number above 1"),
        (
            {"partial_rotary_factor": 0.1},
            "partial_rotary_factor",
            "not pairs within a head of 8",
        ),
        (
            {"partial_rotary_factor": 1.5},
            "partial_rotary_factor",
            "not pairs within a head of 8",
        ),
        (
            {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.25},
            "rope_type",
            "more than two rotated dimensions",
        ),
        (
            {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4},
            "high_freq_factor",
            "more than low_freq_factor",
        ),
        ({**LONGROPE, "long_factor": [1.0, 2.0]}, "long_factor", "4 numbers above 0"),
        ({**LONGROPE, "short_factor": [1, 2, 3, 0]}, "short_factor", "4 numbers above 0"),
        (
            {"rope_type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.4},
            "rope_type",
            "an even number of rotated dimensions",
        ),
        (
            {"rope_type": "yarn", "original_max_position_embeddings": 1},
            "original_max_position_embeddings",
            "a whole number from 2",
        ),
        ({"full_attention": {"rope_type": "default"}}, "full_attention", "not supported"),
    ],
)
def test_invalid_settings(settings, key, wording):
    with pytest.raises(ConfigError, match=wording) as caught:
        read(**settings)
    assert caught.value.key == f"rope_parameters.{key}"


@pytest.mark.parametrize(
    "settings",
    [
        {"partial_rotary_factor": 1e308},
        {"rope_type": "linear", "factor": 1e-320},
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1e308},
        LONGROPE | {"short_factor": [1e-320] * 4, "factor": 2.0},
    ],
)
def test_settings_without_finite_frequencies_are_refused(settings):
    with pytest.raises(ConfigError):
        read(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "dynamic", "factor": 1e308},  # only the first pair rotates
        {"rope_theta": 1e300},
        {"rope_type": "linear", "factor": 1e308},
        {"rope_type": "linear", "factor": 1e-37},  # finite, but not times a position
        {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.0},
        {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1e30},
        LONGROPE | {"long_factor": [1e300] * 4, "factor": 2.0},
    ],
)
def test_settings_that_make_positions_indistinguishable_are_refused(settings):
    with pytest.raises(ConfigError, match="angles that are zero or not finite"):
        read(**settings)
