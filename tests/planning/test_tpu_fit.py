"""Which published TPU slices a model fits on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import jax
import pytest

import mtj_loader
from mtj_loader.planning import tpu_fit
from mtj_loader.planning.load_plan import LoadPlan
from tests.support import neox

GIB = 1 << 30


def plan_of(path: Path, mesh: str = "mp=4", **options) -> LoadPlan:
    made = mtj_loader.plan(path, mesh, **options)
    made.checkpoint.storage.close()
    return made


def widened(plan: LoadPlan, **config: int) -> LoadPlan:
    """The plan with another config: what a fit goes by are sizes alone."""
    return replace(plan, config=replace(plan.config, **config))


def neox_20b(plan: LoadPlan, **config: int) -> LoadPlan:
    sizes = {"layers": 44, "d_model": 6144, "d_embed": 6144, "d_ff": 24576, "max_positions": 2048}
    heads = {"n_heads": 64, "n_kv_heads": 64, "head_dim": 96, "vocab_size": 50432}
    return widened(plan, **(sizes | heads | config))


def find(plan: LoadPlan, name: str) -> tpu_fit.Fit:
    return next(found for found in tpu_fit.fits(plan) if found.slice.name == name)


# The published slices.


def test_parameters_on_a_device_are_those_of_the_plan(tmp_path: Path):
    plan = plan_of(neox.write(tmp_path), "mp=4")
    assert tpu_fit.device_bytes(plan, 4) == plan.device_bytes
    assert tpu_fit.device_bytes(plan, 2) == plan_of(tmp_path, "mp=2").device_bytes


def test_cache_takes_a_key_and_a_value_of_every_head_of_the_shard(tmp_path: Path):
    plan = plan_of(neox.write(tmp_path), "mp=2")  # 2 layers, 4 heads of 6
    assert tpu_fit.cache_bytes_per_token(plan, 2) == 2 * 2 * 2 * 6 * 2
    assert tpu_fit.cache_bytes_per_token(widened(plan, n_kv_heads=1), 2) == 2 * 2 * 1 * 6 * 2
    wide = plan_of(tmp_path, "mp=2", dtype="float32")
    assert tpu_fit.cache_bytes_per_token(wide, 2) == 2 * 2 * 2 * 6 * 4


def test_cache_is_what_the_model_allocates(tmp_path: Path):
    model = mtj_loader.load(neox.write(tmp_path), "mp=2", progress=False)
    cache = model.forward.cache_shapes(1, 8)
    on_a_device = sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize // 2 for leaf in jax.tree.leaves(cache)
    )
    assert on_a_device == 8 * tpu_fit.cache_bytes_per_token(model.plan, 2)


@pytest.mark.parametrize(
    ("name", "devices", "gib"),
    [
        ("v2-8", 8, 8),
        ("v3-8", 8, 16),
        ("v4-8", 4, 32),
        ("v5e-1", 1, 16),
        ("v5e-4", 4, 16),
        ("v5e-8", 8, 16),
        ("v5p-8", 4, 95),
        ("v6e-1", 1, 32),
        ("v6e-4", 4, 32),
        ("v6e-8", 8, 32),
    ],
)
def test_slices_are_the_published_ones(name: str, devices: int, gib: int):
    assert tpu_fit.Slice(name, devices, gib * GIB) in tpu_fit.SLICES


def test_neox_20b_fits_where_it_should(tmp_path: Path):
    plan = neox_20b(plan_of(neox.write(tmp_path)))
    found = {each.slice.name: each.fits for each in tpu_fit.fits(plan)}
    assert [name for name, fits in found.items() if not fits] == ["v5e-1", "v6e-1"]
    v2 = find(plan, "v2-8")
    whole = 44 * 6 * 6144 + 2 * 6144  # norms and biases that every shard has
    published = 20_554_567_680  # parameters of GPT-NeoX-20B
    assert (v2.dp, v2.mp) == (1, 8)
    assert v2.device_bytes == 2 * ((published - whole) // 8 + whole)
    assert v2.free_bytes == int(0.92 * 8 * GIB) - v2.device_bytes
    assert v2.cache_tokens == v2.free_bytes // (2 * 44 * 8 * 96 * 2)


def test_a_slice_takes_the_most_shards_that_the_model_allows(tmp_path: Path):
    plan = plan_of(neox.write(tmp_path))  # 4 heads
    assert (find(plan, "v3-8").dp, find(plan, "v3-8").mp) == (2, 4)
    assert (find(plan, "v5e-1").dp, find(plan, "v5e-1").mp) == (1, 1)


def test_parameters_alone_are_not_enough(tmp_path: Path):
    plan = neox_20b(plan_of(neox.write(tmp_path)), layers=66)
    v2 = find(plan, "v2-8")
    assert v2.free_bytes > 0
    assert not v2.fits
    assert find(widened(plan, max_positions=v2.cache_tokens), "v2-8").fits


def test_summary_says_where_it_fits(tmp_path: Path):
    lines = neox_20b(plan_of(neox.write(tmp_path)), layers=66).summary().splitlines()
    rows = {line.split()[0]: line for line in lines if line.strip().startswith(("v2", "v3", "v5"))}
    held = tpu_fit.device_bytes(neox_20b(plan_of(tmp_path), layers=66), 8)
    assert f"dp=1, mp=8   {held / 1e9:.2f} GB of 8.59 GB" in rows["v2-8"]
    assert "no, less than 2,048 tokens" in rows["v2-8"]
    assert "  yes  " in rows["v3-8"]
    assert "GB too large" in rows["v5e-1"]


def test_dict_has_the_fits(tmp_path: Path):
    plan = plan_of(neox.write(tmp_path), "mp=4")
    made = plan.to_dict()
    assert made["cache_bytes_per_token"] == tpu_fit.cache_bytes_per_token(plan, 4)
    assert isinstance(made["fits"], list)
    held = tpu_fit.device_bytes(plan, 4)
    free = int(0.92 * 8 * GIB) - held
    assert made["fits"][0] == {
        "name": "v2-8",
        "devices": 8,
        "hbm_bytes": 8 * GIB,
        "dp": 2,
        "mp": 4,
        "device_bytes": held,
        "free_bytes": free,
        "cache_tokens": free // tpu_fit.cache_bytes_per_token(plan, 4),
        "min_tokens": 32,
        "fits": True,
        "basis": "estimate",
    }
