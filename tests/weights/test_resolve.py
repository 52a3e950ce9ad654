"""Resolving a checkpoint: nothing is dropped silently, all problems are reported at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import mtj_loader
from mtj_loader.errors import CheckpointMismatchError, MapError, Problem, VerifyError, fold_layers
from tests.support import neox

SEED = Path(__file__).parents[1] / "data/seeds/gpt_neox.json"
DENSE = "gpt_neox.layers.1.attention.dense.weight"

Arrays = dict[str, np.ndarray]


def problems(folder: Path, **options: object) -> tuple[Problem, ...]:
    with pytest.raises(CheckpointMismatchError) as caught:
        mtj_loader.plan(folder, "mp=2", **options)
    return caught.value.problems


def without(name: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {key: value for key, value in arrays.items() if key != name}


def with_(name: str, array: np.ndarray) -> Callable[[Arrays], Arrays]:
    return lambda arrays: arrays | {name: array}


@pytest.mark.parametrize(
    ("change", "config", "expected"),
    [
        pytest.param(
            with_("gpt_neox.layers.1.extra", np.zeros(3, np.float32)),
            {},
            Problem(
                "the map has no entry for this tensor",
                "model.safetensors",
                "gpt_neox.layers.1.extra",
                found="F32 [3]",
            ),
            id="E72-unmapped-source",
        ),
        pytest.param(
            without(DENSE),
            {},
            Problem(
                "the checkpoint has no tensor for a parameter of the model",
                tensor=DENSE,
                target="layer_1/~/linear_3 w",
            ),
            id="E72-unfilled-target",
        ),
        pytest.param(
            without("embed_out.weight"),
            {},
            Problem(
                "the checkpoint has no tensor for a parameter of the model",
                tensor="embed_out.weight",
                target="projection_shard/~/linear w",
            ),
            id="E78-untied-and-no-head",
        ),
        pytest.param(
            with_("embed_in.weight", np.zeros((29, 24), np.float32)),
            {},
            Problem(
                "two tensors for one parameter",
                "model.safetensors",
                target="embedding_shard/~/linear w",
                found="gpt_neox.embed_in.weight, embed_in.weight",
            ),
            id="E71-two-sources-for-one-target",
        ),
        pytest.param(
            with_(DENSE, np.zeros((24, 20), np.float32)),
            {},
            Problem(
                "the shape does not fit the model that config.json describes",
                "model.safetensors",
                DENSE,
                "layer_1/~/linear_3 w",
                "[24, 24]",
                "[24, 20]",
            ),
            id="wrong-shape",
        ),
        pytest.param(
            with_("embed_out.weight", np.zeros((30, 24), np.float32)),
            {},
            Problem(
                "the shape does not fit the model that config.json describes",
                "model.safetensors",
                "embed_out.weight",
                "projection_shard/~/linear w",
                "[29, 24]",
                "[30, 24]",
            ),
            id="S-vocabulary-that-pads-to-the-same",
        ),
        pytest.param(
            with_(DENSE, np.zeros((24, 24), np.int32)),
            {},
            Problem(
                "this dtype cannot be loaded",
                "model.safetensors",
                DENSE,
                "layer_1/~/linear_3 w",
                "F32, F16, BF16",
                "I32",
            ),
            id="A12-unsupported-dtype",
        ),
        pytest.param(
            lambda arrays: arrays,
            {"attention_bias": False},
            Problem(
                "the model that config.json describes has no such parameter",
                "model.safetensors",
                "gpt_neox.layers.0.attention.query_key_value.bias",
                "layer_0/~/combined_qkv b",
            ),
            id="bias-though-the-config-says-none",
        ),
        pytest.param(
            lambda arrays: arrays,
            {"num_hidden_layers": 1},
            Problem(
                "the map has no entry for this tensor",
                "model.safetensors",
                "gpt_neox.layers.1.input_layernorm.weight",
                found="F32 [24]",
            ),
            id="more-layers-than-the-config-says",
        ),
        pytest.param(
            lambda arrays: {
                k.replace("gpt_neox.", "other.gpt_neox."): v for k, v in arrays.items()
            },
            {},
            Problem(
                "the map has no entry for this tensor",
                "model.safetensors",
                "other.gpt_neox.embed_in.weight",
                found="F32 [29, 24]",
            ),
            id="E73-a-suffix-is-no-match",
        ),
    ],
)
def test_a_mismatch_is_named(
    tmp_path: Path, change: Callable[[Arrays], Arrays], config: dict, expected: Problem
) -> None:
    folder = neox.write(tmp_path, change(neox.tensors()), **config)
    assert expected in problems(folder)


def test_all_problems_are_reported_at_once_with_layers_folded(tmp_path: Path) -> None:
    arrays = {k: v for k, v in neox.tensors().items() if "dense.weight" not in k}
    arrays["stray"] = np.zeros(2, np.float32)
    with pytest.raises(CheckpointMismatchError) as caught:
        mtj_loader.plan(neox.write(tmp_path, arrays), "mp=2")
    text = str(caught.value)
    assert "3 problems between checkpoint, map and model" in text
    assert "tensor gpt_neox.layers.{0...1}.attention.dense.weight" in text
    assert "target layer_{0...1}/~/linear_3 w" in text
    assert "tensor stray" in text


def test_unmapped_tensors_can_be_allowed_and_are_warned_about(tmp_path: Path) -> None:
    folder = neox.write(tmp_path, neox.tensors() | {"stray": np.zeros(2, np.float32)})
    plan = mtj_loader.plan(folder, "mp=2", allow_unmapped=True)
    assert plan.unmapped == ("stray",)
    assert "skipped stray: it is not in the weight map" in plan.warnings


def test_allowing_unmapped_tensors_allows_nothing_else(tmp_path: Path) -> None:
    folder = neox.write(tmp_path, without(DENSE)(neox.tensors()))
    assert problems(folder, allow_unmapped=True)[0].tensor == DENSE


def test_buffers_of_old_files_are_skipped_by_the_map(tmp_path: Path) -> None:
    old = neox.tensors()
    old["gpt_neox.layers.0.attention.bias"] = np.zeros((1, 1, 8, 8), np.uint8)
    old["gpt_neox.layers.1.attention.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    for name in ("inv_freq", "cos_cached", "sin_cached"):
        old[f"gpt_neox.rotary_emb.{name}"] = np.zeros(3, np.float32)
    plan = mtj_loader.plan(neox.write(tmp_path, old), "mp=2")
    assert set(plan.skipped) == set(old) - set(neox.tensors())
    assert plan.host_bytes(0) == sum(array.nbytes for array in neox.tensors().values())


def test_files_may_drop_or_add_the_base_prefix(tmp_path: Path) -> None:
    dropped = {k.removeprefix("gpt_neox."): v for k, v in neox.tensors().items()}
    added = {f"model.{k}": v for k, v in neox.tensors().items()}
    one = mtj_loader.load(neox.write(tmp_path / "a", dropped), "mp=2")
    two = mtj_loader.load(neox.write(tmp_path / "b", added), "mp=2")
    three = mtj_loader.load(neox.write(tmp_path / "c"), "mp=2")
    for module, params in three.params.items():
        for param, array in params.items():
            np.testing.assert_array_equal(one.params[module][param], array)
            np.testing.assert_array_equal(two.params[module][param], array)


def test_a_tied_copy_that_is_equal_loads(tmp_path: Path) -> None:
    arrays = neox.tensors()
    arrays["embed_out.weight"] = arrays["gpt_neox.embed_in.weight"]
    folder = neox.write(tmp_path, arrays, tie_word_embeddings=True)
    report = mtj_loader.load(folder, "mp=2").report
    assert report.bytes_read == report.bytes_needed
    # The comparison reads the embedding once more, and its copy.
    assert report.bytes_needed == sum(a.nbytes for a in arrays.values()) + 29 * 24 * 4


def test_a_tied_copy_that_differs_shows_both(tmp_path: Path) -> None:  # E77
    folder = neox.write(tmp_path, neox.tensors(), tie_word_embeddings=True)
    with pytest.raises(VerifyError) as caught:
        mtj_loader.load(folder, "mp=2")
    assert "embed_out.weight" in str(caught.value)
    assert "gpt_neox.embed_in.weight" in str(caught.value)


def test_a_tied_copy_of_another_shape_is_a_mismatch(tmp_path: Path) -> None:
    arrays = neox.tensors() | {"embed_out.weight": np.zeros((28, 24), np.float32)}
    (problem,) = problems(neox.write(tmp_path, arrays, tie_word_embeddings=True))
    assert problem.expected == "F32 [29, 24]"
    assert problem.found == "F32 [28, 24]"


def test_the_seed_map_can_be_given(tmp_path: Path) -> None:
    plan = mtj_loader.plan(neox.write(tmp_path), "mp=2", map=SEED)
    assert plan.map_file == str(SEED)


def test_a_map_of_another_family_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(json.loads(SEED.read_text()) | {"mtj_compat": "j"}))
    with pytest.raises(MapError, match="mtj_compat"):
        mtj_loader.plan(neox.write(tmp_path / "c"), "mp=2", map=path)


def test_a_map_that_reads_a_width_other_than_the_models_is_refused(tmp_path: Path) -> None:
    raw = json.loads(SEED.read_text())
    raw["mtj_config_map"]["d_model"] = "intermediate_size"
    path = tmp_path / "map.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(MapError, match=r"d_model(.|\n)*expected: 24(.|\n)*found: 40"):
        mtj_loader.plan(neox.write(tmp_path / "c"), "mp=2", map=path)


@pytest.mark.parametrize(
    ("tensor", "transforms"),
    [
        ("gpt_neox.layers.{layer}.input_layernorm.weight", ["vocab_pad"]),
        ("gpt_neox.layers.{layer}.input_layernorm.weight", ["divide_by_shards"]),
        ("gpt_neox.layers.{layer}.mlp.dense_h_to_4h.bias", ["divide_by_shards"]),
        ("gpt_neox.layers.{layer}.attention.dense.weight", [{"op": "qkv_blocks_to_heads"}]),
    ],
)
def test_a_transform_that_makes_no_sense_is_refused(
    tensor: str, transforms: list, tmp_path: Path
) -> None:
    raw = json.loads(SEED.read_text())
    raw["layer_weights"][tensor]["mtj"]["transforms"] = transforms
    path = tmp_path / "map.json"
    path.write_text(json.dumps(raw))
    found = problems(neox.write(tmp_path / "c"), map=path)
    assert {problem.what for problem in found} == {
        "the map gives a transform that does not fit the parameter"
    }


def test_transforms_that_make_another_shape_are_refused(tmp_path: Path) -> None:
    raw = json.loads(SEED.read_text())
    raw["static_weights"]["embed_out.weight"]["mtj"]["transforms"] = ["vocab_pad", "no_transpose"]
    path = tmp_path / "map.json"
    path.write_text(json.dumps(raw))
    arrays = neox.tensors() | {"embed_out.weight": np.zeros((29, 30), np.float32)}
    with pytest.raises(MapError, match="do not make the parameter's shape") as caught:
        mtj_loader.plan(neox.write(tmp_path / "c", arrays), "mp=2", map=path)
    assert (caught.value.file, caught.value.tensor) == (str(path), "embed_out.weight")
    assert (caught.value.expected, caught.value.found) == ([24, 30], [30, 30])


def test_folding_keeps_gaps_visible() -> None:
    found = fold_layers([Problem("w", tensor=f"h.{i}.a") for i in (0, 2, 5)])
    assert [p.tensor for p in found] == ["h.{0,2,5}.a"]


def test_a_checkpoint_of_mixed_dtypes_loads(tmp_path: Path) -> None:
    arrays = neox.tensors()
    arrays[DENSE] = arrays[DENSE].astype(ml_dtypes.bfloat16)
    model = mtj_loader.load(neox.write(tmp_path, arrays), "mp=2", dtype="float32")
    weight = model.params["causal_transformer_shard/~/layer_1/~/linear_3"]["w"]
    merged = np.asarray(weight).reshape(24, 24).T
    np.testing.assert_array_equal(merged, arrays[DENSE].astype(np.float32))
    assert model.report.dtype_changes == {"bfloat16 → float32": 1}
