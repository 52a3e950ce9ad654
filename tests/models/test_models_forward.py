"""The compiled passes: declared shapes, cache like the full pass, precision, no retracing."""

from __future__ import annotations

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtj_loader.models import parameters
from mtj_loader.models.layers.attend import BLOCK
from mtj_loader.models.layers.embeddings import Embedding
from mtj_loader.models.layers.norms import LayerNorm
from mtj_loader.models.layers.positions import Positions
from mtj_loader.models.parameter_table import ParameterBuilder
from mtj_loader.models.passes import Rows
from tests.oracle.neox_cases import CASES
from tests.support import passes as cached
from tests.support.models import PARITY, config_of, make_forward, params_of, read_config

HIGHEST = jax.lax.Precision.HIGHEST
CACHE_TOLERANCE = 2e-5  # float32 sums in another order, for logits of a few units

# Rows of unequal length: prompts [b, t] padded on the right, and the tokens after them.
LENGTHS = np.array([7, 3, 5, 1], np.int32)
STEPS = 4


def forward_of(name, **options):
    folder = PARITY / name
    forward = make_forward(config_of(folder), **options)
    return forward, params_of(folder, forward)


def random_rows(forward, shape, seed=0):
    return np.random.default_rng(seed).integers(0, forward.config.vocab_size, shape, np.int32)


@pytest.mark.parametrize("name", ["pythia_like", "serial_tied_unbiased"])
@pytest.mark.parametrize(("dp", "shards"), [(1, 1), (1, 6), (2, 3)])
@pytest.mark.parametrize("transposed", [False, True])
def test_haiku_has_the_parameters_that_are_declared(name, dp, shards, transposed):
    config = read_config(CASES[name])
    forward = make_forward(
        config, dp=dp, mp=shards, transposed_linear=transposed, dtype=jnp.bfloat16
    )
    specs = parameters(config, shards, transposed)
    sharding = NamedSharding(forward.mesh, P("mp"))
    facts = {
        (module, param): (shape.shape, shape.dtype, shape.sharding)
        for module, params in forward.param_shapes().items()
        for param, shape in params.items()
    }
    assert facts == {
        (spec.path, spec.param): (spec.array_shape(shards), jnp.bfloat16, sharding)
        for spec in specs
    }


def test_absent_biases_and_projection_are_not_declared():
    config = read_config(CASES["serial_tied_unbiased"])
    names = {(spec.module, spec.param) for spec in parameters(config, 1, False)}
    assert ("layer_0/~/combined_qkv", "b") not in names
    assert ("layer_0/~/linear_3", "b") not in names
    assert ("layer_0/~/linear_5", "b") in names
    assert ("projection_shard/~/linear", "w") not in names


def test_transposed_linear_transposes_only_linear_weights():
    config = read_config(CASES["pythia_like"])
    plain, turned = (
        {(s.module, s.param): s.array_shape(2) for s in parameters(config, 2, turn)}
        for turn in (False, True)
    )
    for (module, param), shape in plain.items():
        linear = param == "w" and not module.startswith("embedding")
        expected = (shape[0], shape[2], shape[1]) if linear else shape
        assert turned[module, param] == expected


CACHED = [
    ("neox_20b_like", {"dp": 2, "mp": 4}),
    ("serial", {"dp": 1, "mp": 3}),
    ("tied", {"dp": 4, "mp": 2, "transposed_linear": True}),
    ("rope_yarn", {"dp": 1, "mp": 1}),
]


@pytest.mark.parametrize(("name", "options"), CACHED)
def test_cached_steps_equal_the_full_forward_pass(name, options):
    """Every row, at every step, equals the full forward pass of that row alone."""
    forward, params = forward_of(name, **options)
    rows = random_rows(forward, (len(LENGTHS), LENGTHS.max() + STEPS))
    prompts = np.where(np.arange(LENGTHS.max()) < LENGTHS[:, None], rows[:, : LENGTHS.max()], 1)
    totals = LENGTHS + STEPS
    logits, cache = cached.prefill(forward, params, prompts, LENGTHS, totals, 16)
    full = np.asarray(forward.logits(params, rows))
    each = np.arange(len(LENGTHS))
    for n in range(STEPS):
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, full[each, LENGTHS + n - 1], atol=CACHE_TOLERANCE)
        positions = LENGTHS + n
        tokens = rows[each, positions]
        logits, cache = cached.step(forward, params, cache, tokens, positions, totals)


@pytest.mark.parametrize("name", ["rope_dynamic", "rope_longrope"])
def test_frequencies_depend_on_each_rows_total_length(name):
    """Long and short rows in one batch equal the full forward pass at their own lengths."""
    forward, params = forward_of(name, dp=2)
    totals = np.array([29, 9])  # past the trained length, and within
    rows = random_rows(forward, (2, 29))
    eight = np.array([8, 8], np.int32)
    logits, cache = cached.prefill(forward, params, rows[:, :8], eight, totals, 32)
    full = [np.asarray(forward.logits(params, rows[[i], :t]))[0] for i, t in enumerate(totals)]
    np.testing.assert_allclose(logits, [full[0][7], full[1][7]], atol=CACHE_TOLERANCE)
    logits, _ = cached.step(forward, params, cache, rows[:, 8], eight, totals)
    np.testing.assert_allclose(logits, [full[0][8], full[1][8]], atol=CACHE_TOLERANCE)
    other, _ = cached.prefill(forward, params, rows[:, :8], eight, [9, 9], 32)
    assert np.abs(other[0] - full[0][7]).max() > 1e-3


def test_the_cache_is_split_by_rows_and_heads():
    forward, params = forward_of("pythia_like", dp=2, mp=2)
    ids = random_rows(forward, (4, 7))
    _, cache = cached.prefill(forward, params, ids, LENGTHS, LENGTHS, 16)
    assert len(cache.keys) == len(cache.values) == 2
    shapes = forward.cache_shapes(4, 16)
    for array, shape in zip(jax.tree.leaves(cache), jax.tree.leaves(shapes), strict=True):
        assert array.shape == shape.shape == (4, 6, 16, 8)
        assert array.dtype == shape.dtype
        assert array.sharding == shape.sharding == NamedSharding(forward.mesh, P("dp", "mp"))


@pytest.mark.parametrize("name", ["pythia_like", "rope_yarn"])
def test_chunks_equal_the_full_forward_pass(name):
    """A prompt in chunks of one slot, in a cache of several blocks; other slots do not change."""
    forward, params = forward_of(name, dp=2)
    ids = random_rows(forward, (2, 300))  # three blocks
    cache = cached.empty_cache(forward, 4, 4 * BLOCK)
    cache = jax.tree.map(lambda x: x + 7, cache)  # what former sequences left
    frequencies = forward.frequencies([300, 300])
    full = np.asarray(forward.logits(params, ids))
    before = jax.tree.map(np.asarray, cache)
    for start, count in ((0, 256), (256, 3), (259, 41)):
        tokens = np.zeros((2, 256), np.int32)
        tokens[:, :count] = ids[:, start : start + count]
        starts, counts = np.array([start] * 2, np.int32), np.array([count] * 2, np.int32)
        slot = np.array([1, 0], np.int32)  # of each group of two slots
        rows = Rows(tokens, starts, counts, frequencies, slot)
        logits, cache = cached.extend(forward, params, cache, rows)
        np.testing.assert_allclose(logits, full[:, start + count - 1], atol=CACHE_TOLERANCE)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[[0, 3]], old[[0, 3]])
        np.testing.assert_array_equal(np.asarray(new)[[1, 2], :, 300:], old[[1, 2], :, 300:])


def test_every_logit_of_a_chunk():
    forward, params = forward_of("pythia_like", dp=2, mp=2)
    ids = random_rows(forward, (2, 8))
    zeros, lengths = np.zeros(2, np.int32), np.array([8, 5], np.int32)
    rows = Rows(ids, zeros, lengths, forward.frequencies([8, 8]), zeros)
    logits, _ = jax.jit(forward.extend_all)(params, cached.empty_cache(forward, 2, 16), rows)
    full = np.asarray(forward.logits(params, ids))
    np.testing.assert_allclose(logits[0], full[0], atol=CACHE_TOLERANCE)
    np.testing.assert_allclose(logits[1, :5], full[1, :5], atol=CACHE_TOLERANCE)


def test_the_cache_is_donated():
    forward, params = forward_of("pythia_like", dp=2, mp=2)
    ids = random_rows(forward, (4, 7))
    _, cache = cached.prefill(forward, params, ids, LENGTHS, LENGTHS, 16)
    cached.step(forward, params, cache, ids[:, 0], LENGTHS, LENGTHS)
    assert all(array.is_deleted() for array in (*cache.keys, *cache.values))


def test_a_token_beyond_the_cache_changes_nothing():
    """A finished row keeps stepping with the others and must not affect them."""
    forward, params = forward_of("pythia_like", dp=2, mp=2)
    ids = random_rows(forward, (4, 7))
    _, cache = cached.prefill(forward, params, ids, LENGTHS, LENGTHS, 16)
    before = jax.tree.map(np.asarray, cache)
    positions = np.array([16, 17, 100, 16], np.int32)
    logits, after = cached.step(forward, params, cache, ids[:, 0], positions, LENGTHS)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, after))
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_any_batch_on_any_mesh(rows):
    forward, params = forward_of("pythia_like", dp=4, mp=2)
    alone, own = forward_of("pythia_like")
    ids = random_rows(forward, (rows, 6))
    logits = forward.logits(params, ids)
    assert logits.shape == (rows, 6, 61)
    np.testing.assert_allclose(logits, alone.logits(own, ids), atol=CACHE_TOLERANCE)


def test_logits_exclude_the_padding_of_the_vocabulary():
    """61 tokens on 6 shards are padded to 66; huge padding rows would win every argmax."""
    forward, params = forward_of("pythia_like", mp=6)
    module = "causal_transformer_shard/~/projection_shard/~/linear"
    w = np.asarray(params[module]["w"]).copy()
    assert w.shape == (6, 48, 11)
    w[5, :, 6:] = 1e6
    broken = {**params, module: {"w": jax.device_put(w, params[module]["w"].sharding)}}
    ids = random_rows(forward, (2, 5))
    np.testing.assert_array_equal(forward.logits(broken, ids), forward.logits(params, ids))
    prefilled, _ = cached.prefill(forward, broken, ids, np.array([5, 5], np.int32), [5, 5], 8)
    assert prefilled.shape == (2, 61)
    assert np.abs(prefilled).max() < 1e3


def equations(jaxpr):
    """All operations, also those inside jit, shard_map and other calls."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def named(jaxpr, primitive):
    return [e for e in equations(jaxpr.jaxpr) if e.primitive.name == primitive]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["neox_20b_like", "tied"])
def test_products_are_exact_to_float32(name, dtype):
    forward, params = forward_of(name, mp=2, dtype=dtype)
    ids = random_rows(forward, (2, 5))
    lengths = np.array([5, 3], np.int32)
    slots = np.arange(2, dtype=np.int32)
    rows = Rows(ids, np.zeros_like(lengths), lengths, forward.frequencies([5, 5]), slots)
    passes_run = [
        jax.make_jaxpr(lambda p: forward.logits(p, ids))(params),
        jax.make_jaxpr(forward.extend)(params, forward.cache_shapes(2, 8), rows),
        jax.make_jaxpr(forward.extend)(params, forward.cache_shapes(2, 2 * BLOCK), rows),
    ]
    for jaxpr in passes_run:
        products = named(jaxpr, "dot_general")
        # qkv, scores, values, out, up, down in each layer, and the projection
        assert len(products) == 6 * forward.config.layers + 1
        for product in products:
            assert {v.aval.dtype for v in product.invars} == {np.dtype(dtype)}
            assert product.params["precision"] == (HIGHEST, HIGHEST)
            assert product.params["preferred_element_type"] == jnp.float32


def test_bfloat16_is_close_to_float32_of_the_same_weights():
    """With bfloat16 weights in both models, only the rounding of activations differs."""
    folder = PARITY / "pythia_like"
    half = make_forward(config_of(folder), mp=3, dtype=jnp.bfloat16)
    params = params_of(folder, half)
    full = make_forward(config_of(folder), mp=3)
    same = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    ids = random_rows(full, (3, 20))
    rounded, exact = half.logits(params, ids), full.logits(same, ids)
    assert rounded.dtype == jnp.float32
    # bfloat16 has 8 bits: 2^-9 of values up to a few units, and some twenty roundings
    assert np.abs(rounded - exact).max() < 0.15
    assert np.abs(rounded - exact).mean() < 0.02


def test_norms_are_float32_in_bfloat16():
    """A mean of 100 with small differences: bfloat16 statistics would be off by whole units."""
    table = ParameterBuilder({"d": 48}, 1, False, np.dtype(jnp.bfloat16))

    def normalize(x):
        return LayerNorm(table, 1e-5, name="norm")(x)

    rng = np.random.default_rng(0)
    x = jnp.asarray(100 + rng.normal(size=(5, 48)), jnp.bfloat16)
    params = {"norm": {"scale": jnp.ones(48, jnp.bfloat16), "offset": jnp.zeros(48, jnp.bfloat16)}}
    result = hk.transform(normalize).apply(params, None, x)
    assert result.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(np.asarray(result, np.float64), exact, rtol=2**-8)


def test_the_scale_of_an_embedding_is_rounded_to_its_dtype():
    """As in transformers: √3072 = 55.43 is 55.5 in bfloat16, as published Gemmas expect."""
    table = ParameterBuilder({"V": 4, "e": 2}, 1, False, np.dtype(jnp.bfloat16))
    positions = Positions(jnp.zeros((1, 1), jnp.int32))

    def embed(ids):
        return Embedding(table, name="embedding", scale=3072**0.5)(ids, positions)

    rows = jnp.asarray([[0, 0], [0, 0], [0, 0], [9, 1]], jnp.bfloat16)
    run = hk.transform(embed).apply
    params = {"embedding/~/linear": {"w": rows}}
    result = jax.vmap(lambda ids: run(params, None, ids), axis_name="mp")(jnp.full((1, 1, 1), 3))
    np.testing.assert_array_equal(result.ravel(), [500, 55.5])  # 9 · √3072 would be 498


def test_tracing_formats_no_module():
    """By default, Haiku formats the arguments of every module, which takes longer than tracing."""
    texts = []

    def collect(call, args, kwargs, context):
        texts.append(repr(context.module))
        return call(*args, **kwargs)

    forward = make_forward(config_of(PARITY / "pythia_like"))
    with hk.intercept_methods(collect):
        ones = np.ones(1, np.int32)
        rows = Rows(ones[:, None], ones, ones, forward.frequencies([1]), 0 * ones)
        jax.jit(forward.extend).lower(forward.param_shapes(), forward.cache_shapes(1, 4), rows)
    assert len(texts) > 10
    assert all(text.startswith("<mtj_loader.") and " object at " in text for text in texts)
