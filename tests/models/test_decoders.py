"""Llama and relatives, and Mixtral's two layouts: where weights go and what is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mtj_loader
from mtj_loader.errors import MeshError, UsageError
from tests.parity.cases import CASES
from tests.support.decoder_tree import decoder_tree
from tests.support.models import DATA
from tests.support.mtj_tree import Tree

FAMILIES = DATA / "families"
MODULE = "causal_transformer_shard/~/layer_0/~/"


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """By the names that the maps use: experts and norms of heads fused."""
    return fused(load_file(folder / "model.safetensors"))


def fused(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The old layout of Mixtral, expert by expert, as transformers 5 has it."""
    old = ".block_sparse_moe."
    result = {name: t for name, t in tensors.items() if old + "experts." not in name}
    for name in [name for name in result if old + "gate." in name]:
        layer = name.partition(old)[0]
        expert = layer + old + "experts.{}.{}.weight"
        w1, w3, w2 = (
            np.stack([tensors[expert.format(e, w)] for e in range(len(result[name]))])
            for w in ("w1", "w3", "w2")
        )
        result[layer + ".mlp.gate.weight"] = result.pop(name)
        result[layer + ".mlp.experts.gate_up_proj"] = np.concatenate([w1, w3], 1)
        result[layer + ".mlp.experts.down_proj"] = w2
    return stacked(result)


def stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """StableLM's norms of each head as one tensor."""
    result = {name: t for name, t in tensors.items() if ".norms." not in name}
    for first in [name for name in tensors if name.endswith(".norms.0.weight")]:
        layer, rest = first.split(".norms.0.")
        heads = sum(name.startswith(f"{layer}.norms.") for name in tensors)
        parts = [tensors[f"{layer}.norms.{head}.{rest}"] for head in range(heads)]
        result[f"{layer}.{rest}"] = np.stack(parts)
    return result


def tree_of(model: mtj_loader.Model) -> Tree:
    return jax.tree.map(np.asarray, model.params)


def assert_same(tree: Tree, expected: Tree) -> None:
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


TREES = [
    (model_type, name, shards)
    for model_type, shard_counts in {
        "llama": {"llama_2": (1, 3, 6), "llama_3": (2, 8), "yarn_tied": (4,), "dynamic": (2, 4)},
        "mistral": {"windowed": (4, 8), "narrow_window": (6,)},
        "mixtral": {"published": (1, 2, 8), "twelve_experts": (3, 6)},
        "mpt": {"mpt_7b": (1, 2, 6), "clipped": (8,)},
        "gemma2": {"published": (1, 8), "untied_biased": (3,), "twelve_heads": (4,)},
        "gemma3_text": {"published": (2, 8), "untied_biased": (6,), "twelve_heads": (4,)},
        "phi3": {"windowed": (1, 8), "longrope": (6,), "su_tied": (4,)},
        "qwen2": {"published": (1, 8), "windowed": (3,), "layer_types": (4,)},
        "stablelm": {"published": (8,), "parallel_normed": (1, 3), "normed_tied": (2, 4)},
        "qwen3": {"published": (8,), "biased": (1, 6), "ungrouped": (4,)},
    }.items()
    for name, counts in shard_counts.items()
    for shards in counts
]


@pytest.mark.parametrize(("model_type", "name", "shards"), TREES)
@pytest.mark.parametrize("transposed_linear", [False, True])
def test_every_weight_is_in_the_right_place(
    model_type: str, name: str, shards: int, transposed_linear: bool
) -> None:
    folder = FAMILIES / model_type / name
    options: dict[str, Any] = {"transposed_linear": transposed_linear}
    model = mtj_loader.load(folder, f"mp={shards}", dtype="float32", **options)
    expected = decoder_tree(config_of(folder), tensors_of(folder), shards=shards, **options)
    assert_same(tree_of(model), expected)
    assert model.report.bytes_read == model.report.bytes_needed


def test_shards_that_share_a_kv_head_hold_equal_copies_read_once() -> None:
    """Two KV heads on eight shards."""
    folder = FAMILIES / "llama" / "llama_3"
    model = mtj_loader.load(folder, "mp=8", dtype="float32")
    for linear in ("linear_1", "linear_2"):
        w = np.asarray(model.params[MODULE + linear]["w"])
        assert w.shape == (8, 40, 6)
        for j in range(8):
            np.testing.assert_array_equal(w[j], w[j // 4 * 4])
        assert not np.array_equal(w[0], w[4])
    everything = sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    assert model.report.bytes_read == everything


MIXTRALS = {"published": "mp=8", "twelve_experts": "mp=3", "top_one": "mp=2"}


def fused_copy(folder: Path, target: Path) -> Path:
    save_file(tensors_of(folder), target / "model.safetensors")
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


@pytest.mark.parametrize("name", MIXTRALS)
@pytest.mark.parametrize("expert_parallel", [False, True])
def test_both_mixtral_layouts_give_the_same_tree(
    name: str, expert_parallel: bool, tmp_path: Path
) -> None:
    folder = FAMILIES / "mixtral" / name
    options: dict[str, Any] = {"dtype": "float32", "expert_parallel": expert_parallel}
    old = mtj_loader.load(folder, MIXTRALS[name], **options)
    new = mtj_loader.load(fused_copy(folder, tmp_path), MIXTRALS[name], **options)
    assert_same(tree_of(old), tree_of(new))
    assert old.report.bytes_read == old.report.bytes_needed == new.report.bytes_read


DEALT = [("published", 8), ("published", 4), ("twelve_experts", 6), ("top_one", 4)]


@pytest.mark.parametrize(("name", "shards"), DEALT)
def test_whole_experts_give_the_same_logits(name: str, shards: int) -> None:
    folder = FAMILIES / "mixtral" / name
    turned = shards == 4
    options: dict[str, Any] = {"transposed_linear": turned, "expert_parallel": True}
    model = mtj_loader.load(folder, f"mp={shards}", dtype="float32", **options)
    expected = decoder_tree(config_of(folder), tensors_of(folder), shards=shards, **options)
    assert_same(tree_of(model), expected)
    assert model.report.bytes_read == model.report.bytes_needed
    logits = model.logits(np.load(folder / "ids.npy"))
    np.testing.assert_allclose(logits, np.load(folder / "logits.npy"), rtol=0, atol=1e-4)


def test_each_host_reads_only_its_own_experts() -> None:
    """Of two hosts each needs half of the experts, and all that is whole in every shard."""
    folder = FAMILIES / "mixtral" / "published"
    mesh = mtj_loader.make_abstract_mesh("dp=1,mp=8", hosts=2)
    plan = mtj_loader.plan(folder, mesh, dtype="float32", expert_parallel=True)
    tensors = load_file(folder / "model.safetensors")
    whole = sum(t.nbytes for name, t in tensors.items() if "norm" in name or "gate.w" in name)
    split = sum(t.nbytes for t in tensors.values()) - whole
    padding = 3 * tensors["lm_head.weight"][0].nbytes  # 53 tokens, 28 and 25 of 56 rows
    per_host = [plan.without_exchange.host_bytes(host) for host in (0, 1)]
    assert per_host == [whole + (split + padding * 2) // 2, whole + (split - padding * 2) // 2]


def test_unused_experts_do_not_affect_the_logits() -> None:
    """A NaN in an unused expert does not change the logits."""
    folder = FAMILIES / "mixtral" / "top_one"
    model = mtj_loader.load(folder, "mp=1", dtype="float32")
    ids = np.load(folder / "ids.npy")[:1, :1]  # one token uses one of eight experts a layer
    expected = np.asarray(model.logits(ids))
    spared = 0
    for expert in range(8):
        experts = dict(model.params[MODULE + "experts"])
        experts["down"] = experts["down"].at[0, expert].set(np.nan)
        logits = model.forward.logits({**model.params, MODULE + "experts": experts}, ids)
        spared += np.array_equal(logits, expected)
        assert np.array_equal(logits, expected) or np.isnan(logits).all()
    assert spared == 7


def test_experts_that_do_not_divide_by_the_shards() -> None:
    folder = FAMILIES / "mixtral" / "twelve_experts"
    assert mtj_loader.plan(folder, "mp=6", expert_parallel=True).shards == 6
    folder = FAMILIES / "mixtral" / "published"
    config = config_of(folder)
    assert config["num_local_experts"] == 16
    with pytest.raises(MeshError, match=r"experts \(12\)") as caught:
        mtj_loader.plan(FAMILIES / "mixtral" / "twelve_experts", "mp=8", expert_parallel=True)
    assert caught.value.expected == "one of 1, 3, 6"


@pytest.mark.parametrize("model_type", ["llama", "mistral", "mpt", "qwen3"])
def test_expert_parallel_needs_experts(model_type: str) -> None:
    folder = FAMILIES / model_type / next(iter(CASES[model_type]))
    with pytest.raises(UsageError, match="expert_parallel is for models with experts"):
        mtj_loader.plan(folder, "mp=1", expert_parallel=True)
