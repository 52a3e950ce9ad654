"""Positions: ALiBi slopes, sinusoids, rotary pairs, windows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mtj_loader.models.layers import attend as attend_module
from mtj_loader.models.layers.alibi import alibi, bloom_slopes, mpt_slopes
from mtj_loader.models.layers.attend import BLOCK, attend
from mtj_loader.models.layers.embeddings import sinusoids
from mtj_loader.models.layers.positions import Positions, rotate_halves, rotate_pairs
from tests.support.models import make_mesh

PAPER_8 = [2.0**-i for i in range(1, 9)]  # Press et al., section 3
PAPER_16 = [2.0 ** (-i / 2) for i in range(1, 17)]

BLOOM = {
    1: [2.0**-8],
    2: [2.0**-4, 2.0**-8],
    3: [2.0**-4, 2.0**-8, 2.0**-2],
    5: [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1],
    6: [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3],
    8: PAPER_8,
    12: PAPER_8 + PAPER_16[:8:2],
    16: PAPER_16,
}


@pytest.mark.parametrize(("heads", "expected"), BLOOM.items())
def test_bloom_slopes(heads: int, expected: list[float]):
    slopes = bloom_slopes(heads)
    assert slopes.dtype == np.float32
    np.testing.assert_allclose(slopes, expected, rtol=1e-6)


MPT = {
    (1, 8.0): [2.0**-8],
    (3, 8.0): [2.0**-4, 2.0**-8, 2.0**-2],
    (5, 8.0): [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1],
    (8, 8.0): PAPER_8,
    (8, 4.0): PAPER_16[:8],
    (12, 8.0): PAPER_16[1::2] + PAPER_16[:8:2],
    (6, 16.0): [2.0**-4, 2.0**-8, 2.0**-12, 2.0**-16, 2.0**-2, 2.0**-6],
}


@pytest.mark.parametrize(("heads", "bias_max"), MPT)
def test_mpt_slopes(heads: int, bias_max: float):
    slopes = mpt_slopes(heads, bias_max)
    assert slopes.dtype == np.float32
    np.testing.assert_allclose(slopes, MPT[heads, bias_max], rtol=1e-6)


@pytest.mark.parametrize("shards", [1, 2, 3, 6])
def test_alibi_is_the_slope_times_the_distance_for_each_shards_heads(shards: int):
    def local(positions: jax.Array) -> jax.Array:
        return alibi(bloom_slopes(6), Positions(positions), jnp.arange(4))

    on_mesh = jax.shard_map(local, mesh=make_mesh(1, shards), in_specs=P(), out_specs=P(None, "mp"))
    bias = np.asarray(jax.jit(on_mesh)(jnp.array([[0, 2], [3, 1]])))
    assert bias.shape == (2, 6, 2, 4)
    for b, t in np.ndindex(2, 2):
        position = [[0, 2], [3, 1]][b][t]
        expected = np.outer(BLOOM[6], np.arange(4) - position)
        np.testing.assert_allclose(bias[b, :, t], expected, rtol=1e-6)


LAST_OF_THREE = Positions(jnp.array([[2]]), end=3)


def test_a_bias_is_added_to_the_scaled_scores():
    keys = jnp.array([1.0, 2.0, 3.0]).reshape(1, 1, 3, 1)
    q = jnp.full((1, 1, 1, 1), 2.0)
    bias = jnp.array([0.5, 0.0, -4.0]).reshape(1, 1, 1, 3)
    out = attend(q, (keys, keys), LAST_OF_THREE, 0.25, bias=lambda positions, keys: bias[..., keys])
    scores = np.exp([2 * 1 * 0.25 + 0.5, 2 * 2 * 0.25, 2 * 3 * 0.25 - 4])
    np.testing.assert_allclose(out.item(), scores @ [1, 2, 3] / scores.sum(), rtol=1e-6)


def test_a_cap_bounds_the_scaled_scores():
    keys = jnp.array([1.0, 2.0, 30.0]).reshape(1, 1, 3, 1)
    q = jnp.full((1, 1, 1, 1), 2.0)
    out = attend(q, (keys, keys), LAST_OF_THREE, 0.25, cap=0.5)
    scores = np.exp(0.5 * np.tanh(np.array([0.5, 1, 15]) / 0.5))
    np.testing.assert_allclose(out.item(), scores @ [1, 2, 30] / scores.sum(), rtol=1e-6)


def test_a_window_includes_the_query():
    positions, keys = Positions(jnp.array([[0, 3]])), jnp.arange(5)
    assert positions.visible(keys, 2).tolist() == [[[1, 0, 0, 0, 0], [0, 0, 1, 1, 0]]]
    assert positions.visible(keys, 4).tolist() == positions.visible(keys).tolist()


def softmax_attention(q, keys, values, seen, scale):
    """Attention as it is defined, in float64: q [b, t, h, k], keys and values [b, g, T, k]."""
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    groups = q.shape[2] // keys.shape[1]
    keys, values = (np.repeat(x, groups, axis=1) for x in (keys, values))
    scores = np.einsum("bthk,bhTk->bhtT", q, keys) * scale
    scores = np.where(seen[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhtT,bhTk->bthk", weights, values)


@pytest.mark.parametrize("window", [None, 5, 300])
@pytest.mark.parametrize(
    ("starts", "t"), [((0, 0), 3), ((700, 3), 1), ((255, 250), 7), ((767, 1), 1)]
)
def test_attention_in_blocks_is_softmax_attention(window: int | None, starts: tuple, t: int):
    """Rows of different lengths in one cache of six blocks, of which garbage is never seen."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, t, 4, 8)).astype(np.float32)
    keys, values = rng.normal(size=(2, 2, 2, 6 * BLOCK, 8)).astype(np.float32)
    queries = np.array(starts)[:, None] + np.arange(t)
    places = np.arange(6 * BLOCK)
    seen = places <= queries[..., None]
    if window is not None:
        seen &= places > queries[..., None] - window
    keys[:, :, max(starts) + t :] = 1e30  # whoever sees it, sees nothing else

    def local(q, keys, values, queries):
        last = jnp.max(queries) + 1
        positions = Positions(queries, first=jnp.min(queries), end=last)
        return attend(q, (keys, values), positions, 0.3, window=window)

    specs = P(), P(), P(), P()
    on_mesh = jax.shard_map(local, mesh=make_mesh(1, 1), in_specs=specs, out_specs=P("dp", "mp"))
    found = jax.jit(on_mesh)(q, keys, values, queries)
    expected = softmax_attention(q, keys, values, seen, 0.3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def fairseq(rows: int, width: int, padding: int) -> np.ndarray:
    """The table that fairseq's SinusoidalPositionalEmbedding.get_embedding makes, in float64."""
    half = width // 2
    frequencies = 10000.0 ** (-np.arange(half) / (half - 1))
    angles = np.outer(np.arange(rows), frequencies)
    table = np.concatenate([np.sin(angles), np.cos(angles), np.zeros((rows, width % 2))], axis=1)
    table[padding] = 0
    return table


@pytest.mark.parametrize(("width", "padding"), [(12, 1), (13, 2), (4, 30), (64, 7)])
def test_sinusoids_match_fairseq(width: int, padding: int):
    """Position p has row p + 2."""
    positions = np.array([[0, 1, 2, 3, 4], [5, 28, 29, 30, 31]])
    found = sinusoids(jnp.asarray(positions), width, padding)
    assert found.dtype == jnp.float32
    expected = fairseq(34, width, padding)[positions + 2]
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)  # float32 angles up to 33


def test_sinusoids_of_far_positions():
    """A float32 angle of 2000 radians is off by up to 6e-5."""
    found = sinusoids(jnp.array([[2000]]), 64, 1)
    np.testing.assert_allclose(found[0], fairseq(2003, 64, 1)[[2002]], rtol=0, atol=3e-4)


def turn(angles: list[float]) -> tuple[jax.Array, jax.Array]:
    array = jnp.asarray(angles, jnp.float32)[None, None]
    return jnp.cos(array), jnp.sin(array)


def test_rotary_pairs_are_complex_products():
    """Neighbors (0, 1) and (2, 3) of a head are one complex number each; the rest stays."""
    x = np.random.default_rng(0).normal(size=(1, 1, 2, 6)).astype(np.float32)
    found = np.asarray(rotate_pairs(jnp.asarray(x), turn([0.3, 2.0])))
    turned = (x[..., 0:4:2] + 1j * x[..., 1:4:2]) * np.exp(1j * np.array([0.3, 2.0]))
    np.testing.assert_allclose(found[..., 0:4:2], turned.real, atol=1e-6)
    np.testing.assert_allclose(found[..., 1:4:2], turned.imag, atol=1e-6)
    np.testing.assert_array_equal(found[..., 4:], x[..., 4:])


def test_pairs_and_halves_differ_only_in_the_order_of_dimensions():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, 3, 4)), jnp.float32)
    order = jnp.array([0, 2, 1, 3])
    halves = rotate_halves(x[..., order], turn([0.7, 0.1]))
    np.testing.assert_allclose(rotate_pairs(x, turn([0.7, 0.1])), halves[..., order], atol=1e-6)


def test_blocks_that_overlap_count_no_key_twice(monkeypatch: pytest.MonkeyPatch):
    """On TPUs the cache's length need not be a multiple of a block's."""
    q, keys, values = (jax.random.normal(jax.random.key(i), (1, 2, 8, 4)) for i in range(3))
    positions = Positions(jnp.arange(8)[None], (), end=8)

    def run(block: int) -> jax.Array:
        monkeypatch.setattr(attend_module, "BLOCK", block)
        mesh = make_mesh(1, 1)
        on_mesh = jax.shard_map(
            lambda q, k, v: attend(q.swapaxes(1, 2), (k, v), positions, 0.5),
            mesh=mesh,
            in_specs=P("dp", "mp"),
            out_specs=P("dp", None, "mp"),
        )
        return jax.jit(on_mesh)(q, keys, values)

    np.testing.assert_allclose(run(3), run(8), rtol=1e-6, atol=1e-6)
