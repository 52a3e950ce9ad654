"""MPT's options that transformers ignores, against a plain reference in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import mtj_loader
from mtj_loader.errors import CheckpointMismatchError, ConfigError
from mtj_loader.models.families.mpt import Config
from tests.support import mpt_reference
from tests.support.checkpoints import write_checkpoint
from tests.support.decoder_tree import decoder_tree
from tests.support.families import TOLERANCE, assert_cached_logits
from tests.support.models import DATA
from tests.support.mpt_options import ATTENTION, CONFIG, config
from tests.support.mpt_options import MPT_OPTIONS as CASES

MESHES = {
    "steep_alibi": "mp=6",
    "steep_alibi_of_eight_heads": "dp=2,mp=4",
    "qk_ln": "mp=3",
    "qk_ln_with_biases": "mp=6",
    "learned_positions": "mp=8",
    "no_positions": "dp=2,mp=4",
    "biases": "mp=4",
    "narrow": "mp=3",
    "scaled_logits": "mp=2",
}


def written(folder: Path, settings: dict[str, Any]) -> tuple[Path, dict[str, np.ndarray]]:
    tensors = mpt_reference.random_tensors(settings, seed=1)
    return write_checkpoint(folder, {"model.safetensors": tensors}, settings), tensors


def random_ids() -> np.ndarray:
    return np.random.default_rng(2).integers(0, CONFIG["vocab_size"], (4, 12))


def test_the_reference_agrees_with_transformers() -> None:
    for name in ("mpt_7b", "clipped"):
        folder = DATA / "families" / "mpt" / name
        settings = json.loads((folder / "config.json").read_text())
        settings = {**CONFIG, **settings, "attn_config": ATTENTION | settings["attn_config"]}
        ids, expected = np.load(folder / "ids.npy"), np.load(folder / "logits.npy")
        logits = mpt_reference.logits(settings, load_file(folder / "model.safetensors"), ids)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, tmp_path: Path) -> None:
    folder, tensors = written(tmp_path, CASES[name])
    turned = len(name) % 2 == 0  # alternates between cases
    mesh = MESHES[name]
    model = mtj_loader.load(folder, mesh, dtype="float32", transposed_linear=turned)
    ids = random_ids()
    expected = mpt_reference.logits(CASES[name], tensors, ids)
    np.testing.assert_allclose(model.logits(ids), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["steep_alibi", "qk_ln_with_biases", "learned_positions"])
def test_cached_logits(name: str, tmp_path: Path) -> None:
    folder, tensors = written(tmp_path, CASES[name])
    ids = random_ids()
    model = mtj_loader.load(folder, "dp=2,mp=2", dtype="float32")
    assert_cached_logits(model, ids, mpt_reference.logits(CASES[name], tensors, ids))


@pytest.mark.parametrize("name", ["qk_ln_with_biases", "learned_positions"])
@pytest.mark.parametrize("transposed_linear", [False, True])
def test_every_weight_is_in_the_right_place(
    name: str, transposed_linear: bool, tmp_path: Path
) -> None:
    folder, tensors = written(tmp_path, CASES[name])
    options: dict[str, Any] = {"transposed_linear": transposed_linear}
    model = mtj_loader.load(folder, "mp=2", dtype="float32", **options)
    expected = decoder_tree(CASES[name], tensors, shards=2, **options)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, model.params), expected)


def test_learned_positions_together_with_alibi_are_refused(tmp_path: Path) -> None:
    """Published configs have learned_pos_emb: true but no such table."""
    settings = config()
    tensors = mpt_reference.random_tensors(settings, seed=1)
    table = {"transformer.wpe.weight": np.zeros((20, 24), np.float32)}
    write_checkpoint(tmp_path, {"model.safetensors": tensors | table}, settings)
    with pytest.raises(CheckpointMismatchError, match=r"transformer\.wpe\.weight"):
        mtj_loader.plan(tmp_path, "mp=1")


def read(settings: dict[str, Any]) -> Config:
    return Config.read(settings, file="config.json")


def test_defaults_are_those_of_transformers() -> None:
    found = read({})
    assert (found.d_model, found.n_heads, found.layers, found.vocab_size) == (2048, 16, 24, 50368)
    assert (found.d_ff, found.max_positions, found.norm_eps) == (8192, 2048, 1e-5)
    assert (found.alibi_bias_max, found.clip_qkv, found.softmax_scale) == (8, None, 128**-0.5)
    assert (found.bias, found.qk_norm, found.learned_positions) == (False, False, False)
    assert (found.logit_scale, found.tie_word_embeddings) == (1, True)


def test_clip_qkv_of_zero_means_no_bound() -> None:
    assert read(config({"clip_qkv": 0})).clip_qkv is None


REFUSED = [
    (config({"attn_type": "multiquery_attention"}), "attn_config.attn_type", "not supported"),
    (config({"prefix_lm": True}), "attn_config.prefix_lm", "not supported"),
    (config({"attn_uses_sequence_id": True}), "attn_config.attn_uses_sequence_id", "supported"),
    (config({"rope": True}), "attn_config.rope", "not supported"),
    (config({"kv_n_heads": 2}), "attn_config.kv_n_heads", "not supported"),
    (config({"sliding_window_size": 512}), "attn_config.sliding_window_size", "not supported"),
    (config({"clip_qkv": -1}), "attn_config.clip_qkv", "not a legal value"),
    (config(norm_type="rmsnorm"), "norm_type", "not a legal value"),
    (config(logit_scale="sqrt"), "logit_scale", "not a legal value"),
    (config(expansion_ratio=2.3), "expansion_ratio", "not the width of a feed-forward layer"),
    (config(expansion_ratio=0), "expansion_ratio", "not the width of a feed-forward layer"),
    (config(ffn_config={"ffn_type": "mptglu"}), "ffn_config.ffn_type", "not a legal value"),
    (config(ffn_config={"ffn_act_fn": {}}), "ffn_config.ffn_act_fn", "not supported"),
    ({**CONFIG, "attn_config": "multihead"}, "attn_config", "not an object"),
    (config(n_heads=5), "d_model", "d_model is not a multiple of n_heads"),
    (config(hidden_size=32), "d_model and hidden_size", "two spellings of one setting disagree"),
]


@pytest.mark.parametrize(("settings", "key", "wording"), REFUSED)
def test_refusals(settings: dict[str, Any], key: str, wording: str) -> None:
    with pytest.raises(ConfigError, match=wording) as caught:
        read(settings)
    assert caught.value.key == key
    assert caught.value.file == "config.json"
