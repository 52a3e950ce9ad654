"""LoRA adapters: correct sums, only the needed rows and columns are read, the rest is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import mtj_loader
from mtj_loader.errors import (
    CheckpointError,
    UsageError,
    VerifyError,
)
from mtj_loader.loading.verify import verify
from mtj_loader.lora import merge
from tests.support import neox
from tests.support.adapters import DENSE, QKV, TERMS, linear, merged, write_adapter
from tests.support.command_line import run

SCALE = 5 / 3


def close(found: dict, expected: dict, rtol: float = 1e-6) -> None:
    """float32 sums of three products, rounded: a few units in the last place."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=2e-6), found, expected
    )


@pytest.mark.parametrize("transposed_linear", [False, True])
@pytest.mark.parametrize("mesh", ["mp=1", "mp=4", "dp=2,mp=2"])
def test_an_adapter_equals_a_merge_by_hand(
    mesh: str, transposed_linear: bool, tmp_path: Path
) -> None:
    # Small weights: with weights near 1 the logits are near 50, which magnifies the last bit.
    weights = {name: np.float32(0.2) * array for name, array in neox.tensors().items()}
    terms = {name: np.float32(0.4) * array for name, array in TERMS.items()}
    base = neox.write(tmp_path / "base", weights)
    by_hand = neox.write(tmp_path / "hand", merged(weights, terms, SCALE))
    adapter = write_adapter(tmp_path / "adapter", terms)
    options = {"dtype": "float32", "transposed_linear": transposed_linear}
    model = mtj_loader.load(base, mesh, adapter=adapter, **options)
    expected = mtj_loader.load(by_hand, mesh, **options)
    close(model.params, expected.params)
    assert model.report.bytes_read == model.report.bytes_needed
    factors = sum(array.nbytes for array in TERMS.values())
    assert model.report.bytes_needed == expected.report.bytes_needed + factors
    ids = np.arange(10).reshape(2, 5)
    np.testing.assert_allclose(model.logits(ids), expected.logits(ids), atol=1e-4)
    assert verify(model.plan, model.params)


def test_the_sum_is_rounded_once(tmp_path: Path) -> None:
    """A float32 checkpoint loaded as bfloat16: base and term are added in float32."""
    base, adapter = neox.write(tmp_path / "base"), write_adapter(tmp_path / "a", TERMS)
    wide = mtj_loader.load(base, "mp=2", dtype="float32", adapter=adapter)
    narrow = mtj_loader.load(base, "mp=2", adapter=adapter)
    rounded = jax.tree.map(lambda a: np.asarray(a).astype(ml_dtypes.bfloat16), wide.params)
    jax.tree.map(np.testing.assert_array_equal, narrow.params, rounded)


def test_a_shard_reads_only_its_rows_and_columns(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", TERMS)
    pod = mtj_loader.make_abstract_mesh("mp=4", hosts=4)
    plan = mtj_loader.plan(neox.write(tmp_path / "base"), pod, adapter=adapter)
    # Column-parallel: a fourth of B's rows and all of A; row-parallel (dense) the other way round.
    b_rows = 3 * (72 // 4 + 40 // 4 + 32 // 4) * 4
    a_whole = 3 * 24 * 3 * 4
    dense = 3 * (24 + 24 // 4) * 4
    assert plan.adapter_bytes(0) == b_rows + a_whole + dense
    assert plan.adapter_bytes(3) == plan.adapter_bytes(0) - 3 * 3 * 4  # three rows of padding


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 5 / 3),
        ({"use_rslora": True}, 5 / math.sqrt(3)),
        ({"lora_alpha": 7}, 7 / 3),
        ({"alpha_pattern": {"dense": 9}}, 9 / 3),
        ({"alpha_pattern": {r".*\.attention\.dense": 9, "dense": 2}}, 9 / 3),
        ({"alpha_pattern": {"ense": 9}}, 5 / 3),
        ({"alpha_pattern": {r"([a-z_0-9]+\.?)+!": 9}}, 5 / 3),  # which `re` would never finish
        ({"alpha_pattern": {r"gpt_neox\.layers\.[0-1]\..*\.(query_key_value|dense)": 9}}, 9 / 3),
        ({"r": 64, "rank_pattern": {"layers.1.attention.dense": 3}}, 5 / 3),
    ],
)
def test_the_scale_is_that_of_the_module(config: dict, scale: float, tmp_path: Path) -> None:  # F90
    term = linear(DENSE.format(1), 24, 24)
    adapter = write_adapter(tmp_path / "a", term, **config)
    model = mtj_loader.load(neox.write(tmp_path / "base"), "mp=2", dtype="float32", adapter=adapter)
    by_hand = neox.write(tmp_path / "hand", merged(neox.tensors(), term, scale))
    close(model.params, mtj_loader.load(by_hand, "mp=2", dtype="float32").params)


def test_adapters_add_up_with_their_weights(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", TERMS)
    other_terms = linear(QKV.format(0), 72, 24, rank=2, seed=9)
    two = write_adapter(tmp_path / "two", other_terms, r=2, lora_alpha=1)
    base = neox.write(tmp_path / "base")
    both = [(one, 0.5), (two, -2.0)]
    model = mtj_loader.load(base, "mp=4", dtype="float32", adapter=both)
    hand = merged(merged(neox.tensors(), TERMS, SCALE * 0.5), other_terms, -2.0 / 2)
    expected = mtj_loader.load(neox.write(tmp_path / "hand", hand), "mp=4", dtype="float32")
    close(model.params, expected.params)


def test_an_adapter_can_be_added_and_removed_after_loading(tmp_path: Path) -> None:
    base, adapter = neox.write(tmp_path / "base"), write_adapter(tmp_path / "a", TERMS)
    plain = mtj_loader.load(base, "mp=4", dtype="float32")
    before = jax.tree.map(np.array, plain.params)
    adapted = plain.with_adapter(adapter)
    at_load = mtj_loader.load(base, "mp=4", dtype="float32", adapter=adapter)
    close(adapted.params, at_load.params, rtol=0)
    norm = "causal_transformer_shard/~/layer_0/~/replicated_layer_norm"
    assert adapted.params[norm]["scale"] is plain.params[norm]["scale"]  # shared
    for model in (plain, adapted.without_adapter(), at_load.without_adapter()):
        jax.tree.map(np.testing.assert_array_equal, model.params, before)
    twice = adapted.with_adapter([(adapter, -1.0)])  # takes it back, up to rounding
    close(twice.params, before, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, twice.without_adapter().params, before)


def test_embeddings_can_be_adapted(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(3, 29)), random.normal(size=(24, 3))
    name = "base_model.model.gpt_neox.embed_in"
    terms = {
        f"{name}.lora_embedding_A": a.astype(np.float32),
        f"{name}.lora_embedding_B": b.astype(np.float32),
        f"{name}.base_layer.weight": neox.tensors()["gpt_neox.embed_in.weight"],
    }
    adapter = write_adapter(tmp_path / "a", terms)
    model = mtj_loader.load(neox.write(tmp_path / "c"), "mp=4", dtype="float32", adapter=adapter)
    found = np.asarray(model.params["causal_transformer_shard/~/embedding_shard/~/linear"]["w"])
    table = found.reshape(32, 24)
    expected = neox.tensors()["gpt_neox.embed_in.weight"] + SCALE * (b @ a).T
    np.testing.assert_allclose(table[:29], expected, atol=1e-5)
    np.testing.assert_array_equal(table[29:], 0)


def test_a_carried_base_weight_that_differs_is_refused(tmp_path: Path) -> None:
    base_weights = {
        f"base_model.model.{DENSE.format(1)}.base_layer.weight": np.ones((24, 24), np.float32)
    }
    adapter = write_adapter(tmp_path / "a", TERMS | base_weights)
    model = mtj_loader.load(neox.write(tmp_path / "base"), "mp=2")
    with pytest.raises(VerifyError, match="contains a base weight"):
        model.with_adapter(adapter)
    with pytest.raises(VerifyError, match=r"contains a base weight(.|\n)*layers\.1\.attention"):
        mtj_loader.load(neox.write(tmp_path / "c"), "mp=4", adapter=adapter)


def test_a_carried_base_weight_is_compared_with_what_was_loaded(tmp_path: Path) -> None:
    arrays = neox.tensors()
    name = f"{DENSE.format(1)}.weight"
    base_weights = {f"base_model.model.{DENSE.format(1)}.base_layer.weight": arrays[name]}
    adapter = write_adapter(tmp_path / "a", TERMS | base_weights)
    base = neox.write(tmp_path / "c")
    model = mtj_loader.load(base, "mp=2")
    neox.write(base, neox.tensors(seed=1))
    with pytest.raises(CheckpointError, match="changed after its header was read"):
        model.with_adapter(adapter)


def test_a_carried_base_weight_may_have_the_same_nan(tmp_path: Path) -> None:
    arrays = neox.tensors()
    name = f"{DENSE.format(1)}.weight"
    arrays[name][3, 4] = np.nan
    base_weights = {f"base_model.model.{DENSE.format(1)}.base_layer.weight": arrays[name]}
    adapter = write_adapter(tmp_path / "a", TERMS | base_weights)
    base = neox.write(tmp_path / "c", arrays)
    model = mtj_loader.load(base, "mp=2", allow_nonfinite=True, adapter=adapter)
    assert len(model.plan.base_weights) == 1


@pytest.mark.parametrize(
    "adapter", [["a"], [("a", math.nan)], [("a", 1, 2)], 5, [("a", "b")], [(5, 1.0)]]
)
def test_a_list_of_adapters_has_weights(adapter: list, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not an adapter"):
        mtj_loader.plan(neox.write(tmp_path), "mp=2", adapter=adapter)


def test_products_set_their_precision() -> None:
    left, right = np.zeros((2, 4, 3), np.float32), np.zeros((2, 3, 5), np.float32)
    sharding = jax.sharding.NamedSharding(
        mtj_loader.make_mesh("mp=2"), jax.sharding.PartitionSpec("mp")
    )

    def add(base: jax.Array) -> object:
        return merge._sum(base, [(left, right)], np.dtype(np.float32), sharding)

    text = str(jax.make_jaxpr(add)(np.zeros((2, 4, 5), np.float32)))
    assert "dot_general" in text
    assert text.count("HIGHEST") >= text.count("dot_general[")


def test_the_command_line_takes_adapters_with_weights(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", TERMS)
    base = neox.write(tmp_path / "base")
    arguments = [
        "plan",
        str(base),
        "--mesh",
        "mp=2",
        "--adapter",
        f"{one}=0.5",
        "--adapter",
        str(one),
    ]
    text = run(*arguments)
    assert text.exit_code == 0, text.stderr
    assert "2 adapters added" in text.stdout
    plan = json.loads(run(*arguments, "--json").stdout)
    changed = {p["module"] for p in plan["parameters"] if p["changes"]["adapters"] == 2}
    assert "causal_transformer_shard/~/layer_0/~/combined_qkv" in changed
    assert len(changed) == 4


def test_verify_finds_an_adapter_that_was_merged_wrongly(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", TERMS)
    model = mtj_loader.load(neox.write(tmp_path / "base"), "mp=2", adapter=adapter)
    verify(model.plan, model.params)
    without = model.without_adapter()
    with pytest.raises(VerifyError, match="query_key_value"):
        verify(model.plan, without.params)
