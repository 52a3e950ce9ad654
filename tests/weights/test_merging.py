"""Conversions: many tensors are merged into one, and shards are cut before the merge."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mtj_loader.errors import CheckpointMismatchError, MapError, Problem
from mtj_loader.formats.records import TensorIndex, TensorRecord
from mtj_loader.parameters import ParamSpec, axes
from mtj_loader.weights.copies import runs, shard_copies, shard_layouts
from mtj_loader.weights.map_reader import parse_map
from mtj_loader.weights.merging import NO_CONVERSIONS, convert
from mtj_loader.weights.resolve import resolve
from mtj_loader.weights.transforms import TransformContext
from mtj_loader.weights.view import view_of
from tests.weights.test_view import materialize

GATE_UP = {
    "source_patterns": [
        "block_sparse_moe.experts.*.w1.weight",
        "block_sparse_moe.experts.*.w3.weight",
    ],
    "target_patterns": "mlp.experts.gate_up_proj",
    "operations": [{"merge_modulelist": {"dim": 0}}, {"concatenate": {"dim": 1}}],
}
DOWN = {
    "source_patterns": ["block_sparse_moe.experts.*.w2.weight"],
    "target_patterns": "mlp.experts.down_proj",
    "operations": [{"merge_modulelist": {"dim": 0}}],
}
ROUTER = {"rename": "block_sparse_moe.gate", "to": "mlp.gate"}


def raw(*conversions: object, prefix: object = "model.layers.{layer}.") -> dict:
    return {
        "mtj_compat": "mixtral",
        "mtj_pe": "rotary",
        "mtj_config_map": {"layers": "l", "d_model": "d", "n_heads": "h"},
        "static_weights": {},
        "layer_weights": {},
        "layer_prefix": prefix,
        "conversions": list(conversions),
    }


CONVERSIONS = parse_map(raw(ROUTER, GATE_UP, DOWN), file="m").conversions


def tensors(experts: int, prefix: str = "model.") -> dict[str, np.ndarray]:
    """Expert weights of one layer, w1 and w3 [I=4, H=3], w2 [H=3, I=4], all random."""
    random = np.random.default_rng(0)
    found = {}
    for expert in range(experts):
        for name, shape in (("w1", (4, 3)), ("w2", (3, 4)), ("w3", (4, 3))):
            key = f"{prefix}layers.5.block_sparse_moe.experts.{expert}.{name}.weight"
            found[key] = random.normal(size=shape)
    return found


def records(arrays: dict[str, np.ndarray]) -> dict[str, TensorRecord]:
    return {name: TensorRecord(name, "f", 0, "F32", a.shape) for name, a in sorted(arrays.items())}


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_experts_are_stacked_by_number_and_gate_comes_before_up(prefix: str) -> None:
    arrays = tensors(12, prefix)  # twelve: in text order, expert 10 would come before expert 2
    sources, problems = convert(records(arrays), CONVERSIONS)
    assert problems == []
    found = {source.name: materialize(source.view, arrays) for source in sources}
    expert = prefix + "layers.5.block_sparse_moe.experts.{}.{}.weight"
    gates, ups, downs = (
        np.stack([arrays[expert.format(e, w)] for e in range(12)]) for w in ("w1", "w3", "w2")
    )
    assert set(found) == {
        "model.layers.5.mlp.experts.gate_up_proj",
        "model.layers.5.mlp.experts.down_proj",
    }
    gate_up = found["model.layers.5.mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(gate_up, np.concatenate([gates, ups], axis=1))
    np.testing.assert_array_equal(found["model.layers.5.mlp.experts.down_proj"], downs)


def test_renames_match_whole_components_of_a_name() -> None:
    names = ["gate.weight", "gates.weight", "experts_gate.weight"]
    arrays = {f"model.layers.0.block_sparse_moe.{name}": np.zeros(2) for name in names}
    sources, _ = convert(records(arrays), CONVERSIONS)
    assert {source.name for source in sources} == {
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.block_sparse_moe.gates.weight",
        "model.layers.0.block_sparse_moe.experts_gate.weight",
    }


def test_a_shard_is_cut_from_every_expert_before_anything_is_merged() -> None:
    arrays = tensors(2)
    sources, _ = convert(records(arrays), CONVERSIONS)
    view = next(s.view for s in sources if s.name.endswith("gate_up_proj"))
    spec = ParamSpec("m", "gate_up", axes("E d (2 f)", {"E": 2, "d": 3, "f": 4}), "f")
    view = TransformContext(2, 0, transposed_linear=False).apply(view, spec, frozenset())
    second = shard_layouts(view.layout, spec.groups, "f", 2)[1]
    copies = shard_copies(second).copies
    assert len(copies) == 4  # gate and up of two experts
    assert [runs((copy,)).tolist() for copy in copies] == [[[6, 12]]] * 4  # rows 2 and 3 of each
    whole = materialize(view, arrays).reshape(2, 3, 2, 4)
    shard = materialize(view.with_layout(second), arrays)
    np.testing.assert_array_equal(shard, whole[..., 2:])


def test_a_missing_expert_is_named() -> None:
    arrays = tensors(3)
    del arrays["model.layers.5.block_sparse_moe.experts.1.w3.weight"]
    _, problems = convert(records(arrays), CONVERSIONS)
    assert problems == [
        Problem(
            "tensors cannot be merged into one: there is no block_sparse_moe.experts.1.w3.weight",
            "f",
            tensor="model.layers.5.mlp.experts.gate_up_proj",
        )
    ]


@pytest.mark.parametrize(
    ("operations", "words"),
    [
        ((3, 1), "merge_modulelist has dim 3, but there are 3 dimensions"),
        ((0, 7), "concatenate has dim 7, but there are 3 dimensions"),
    ],
)
def test_axes_out_of_range_are_refused(operations: tuple[int, int], words: str) -> None:
    merge = replace(CONVERSIONS.merges[0], stack_axis=operations[0], concat_axis=operations[1])
    _, problems = convert(records(tensors(2)), replace(CONVERSIONS, merges=(merge,)))
    assert [problem.what for problem in problems] == [f"tensors cannot be merged into one: {words}"]


def test_parts_of_two_dtypes_are_refused() -> None:
    name = "model.layers.{layer}.mlp.experts.gate_up_proj"
    target = {"mtj": {"module": "layer_{layer}/~/experts", "param": "gate_up"}}
    weight_map = parse_map(raw(GATE_UP) | {"layer_weights": {name: target}}, file="m")
    spec = ParamSpec("layer_5/~/experts", "gate_up", axes("E d (2 f)", {"E": 2, "d": 3, "f": 4}))
    found = records({key: a for key, a in tensors(2).items() if ".w2." not in key})
    odd = "model.layers.5.block_sparse_moe.experts.1.w3.weight"
    found[odd] = replace(found[odd], dtype="BF16")
    with pytest.raises(CheckpointMismatchError) as caught:
        resolve(weight_map, TensorIndex(found, {}), [spec], TransformContext(1, 0, False), layers=6)
    (problem,) = caught.value.problems
    assert problem.what == "the parts of one parameter differ in dtype"
    assert (problem.expected, problem.found) == ("one dtype", "F32, BF16")


def test_two_spellings_of_one_expert_are_refused() -> None:
    arrays = tensors(2) | {"layers.5.block_sparse_moe.experts.1.w1.weight": np.zeros((4, 3))}
    _, (problem,) = convert(records(arrays), CONVERSIONS)
    assert problem.what == "two tensors for one part of a parameter"
    assert {problem.tensor, problem.found} == {
        "layers.5.block_sparse_moe.experts.1.w1.weight",
        "model.layers.5.block_sparse_moe.experts.1.w1.weight",
    }


@pytest.mark.parametrize("number", ["999999", "1" * 5000])
def test_an_expert_of_a_large_number_costs_no_memory(number: str) -> None:
    name = f"model.layers.5.block_sparse_moe.experts.{number}.w1.weight"
    sources, problems = convert(records(tensors(2) | {name: np.zeros((4, 3))}), CONVERSIONS)
    unmerged = [source.name for source in sources if source.name == name]
    assert len(problems) + len(unmerged) == 1  # a gap, or a name that no pattern matches


def test_experts_of_different_shapes_are_named() -> None:
    arrays = tensors(2)
    arrays["model.layers.5.block_sparse_moe.experts.1.w2.weight"] = np.zeros((2, 4))
    _, (problem,) = convert(records(arrays), CONVERSIONS)
    assert "cannot join (1, 2, 4) to (1, 3, 4)" in problem.what


def test_without_conversions_names_are_unchanged() -> None:
    arrays = tensors(1)
    sources, _ = convert(records(arrays), NO_CONVERSIONS)
    assert {source.name for source in sources} == set(arrays)


@pytest.mark.parametrize(
    ("conversion", "words"),
    [
        (GATE_UP | {"operations": [{"concatenate": {"dim": 1}}]}, "operations do not fit"),
        (GATE_UP | {"operations": [{"merge_modulelist": {"dim": 0}}]}, "operations do not fit"),
        (DOWN | {"operations": [{"merge_modulelist": {"dim": -1}}]}, "operations do not fit"),
        (DOWN | {"operations": [{"merge_modulelist": {"dim": True}}]}, "operations do not fit"),
        (DOWN | {"source_patterns": ["experts.w2"]}, "names with one"),
        (DOWN | {"source_patterns": []}, "names with one"),
        (DOWN | {"more": 1}, "unknown key"),
        (ROUTER | {"more": 1}, "unknown key"),
        ({"rename": "a"}, r"a required setting is missing(.|\n)*conversions\[0\]\.to"),
        (3, "not an object"),
    ],
)
def test_conversions_outside_the_vocabulary_are_refused(conversion: object, words: str) -> None:
    with pytest.raises(MapError, match=words):
        parse_map(raw(conversion), file="m")


@pytest.mark.parametrize("prefix", ["model.layers.", 3, "{layer}.{layer}"])
def test_conversions_need_a_layer_prefix(prefix: object) -> None:
    with pytest.raises(MapError):
        parse_map(raw(ROUTER, prefix=prefix), file="m")


@pytest.mark.parametrize("transposed_linear", [False, True])
def test_blocks_of_q_k_v_become_heads(transposed_linear: bool) -> None:
    heads, size, width = 3, 2, 5
    q, k, v = np.arange(3.0 * heads * size * width).reshape(3, heads, size, width)
    stored = np.concatenate([part.reshape(heads * size, width) for part in (q, k, v)])
    by_head = np.stack([q, k, v], axis=1)  # [h, 3, k, d]
    sizes = {"d": width, "h": heads, "k": size}
    pattern = "(h 3 k) d" if transposed_linear else "d (h 3 k)"
    spec = ParamSpec("m", "w", axes(pattern, sizes), "h")
    layout = TransformContext(1, 0, transposed_linear)
    transforms = frozenset({"qkv_blocks_to_heads"})
    assert layout.file_shape(spec, transforms) == stored.shape
    view = view_of(TensorRecord("t", "f", 0, "F32", stored.shape))
    found = materialize(layout.apply(view, spec, transforms), {"t": stored})
    expected = by_head if transposed_linear else np.moveaxis(by_head, -1, 0)
    np.testing.assert_array_equal(found, expected)


def test_fewer_kv_heads_than_shards_are_repeated() -> None:
    spec = ParamSpec("m", "w", axes("d (g k)", {"d": 2, "g": 2, "k": 3}), "g")
    assert spec.array_shape(8) == (8, 2, 3)
    layouts = shard_layouts(
        view_of(TensorRecord("t", "f", 0, "F32", (2, 6))).layout, spec.groups, "g", 8
    )
    assert layouts[:4] == (layouts[0],) * 4
    assert layouts[4:] == (layouts[4],) * 4
    assert layouts[0] != layouts[4]
