"""Map entries that split the rows of one tensor into several parameters, as for Phi-3."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import mtj_loader
from mtj_loader.errors import AdapterMismatchError, CheckpointMismatchError, MapError, Problem
from mtj_loader.formats.records import TensorIndex, TensorRecord
from mtj_loader.loading.verify import verify
from mtj_loader.parameters import ParamSpec, axes
from mtj_loader.weights.copies import shard_layouts
from mtj_loader.weights.map_reader import find_map, parse_map
from mtj_loader.weights.resolve import resolve
from mtj_loader.weights.transforms import TransformContext
from tests.support.adapters import linear, merged, write_adapter
from tests.support.checkpoints import write_checkpoint
from tests.weights.test_view import materialize

HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 16, 12, 4, 2, 6, 2
Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": 29,
    "max_position_embeddings": 32,
    "attention_bias": True,
    "mlp_bias": True,
}
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
ROWS = {"q_proj": Q, "k_proj": KV, "v_proj": KV, "gate_proj": WIDTH, "up_proj": WIDTH}
MESHES = ["mp=1", "mp=2", "mp=4", "dp=2,mp=2"]

Arrays = dict[str, np.ndarray]


def separate() -> Arrays:
    """The tensors under the names of llama."""
    random = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (29, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (29, HIDDEN),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (HIDDEN,)
        shapes[layer + "post_attention_layernorm.weight"] = (HIDDEN,)
        for module in (name for names in FUSED.values() for name in names):
            rows = ROWS[module.partition(".")[2]]
            shapes[f"{layer}{module}.weight"] = (rows, HIDDEN)
            shapes[f"{layer}{module}.bias"] = (rows,)
        for module, columns in (("self_attn.o_proj", Q), ("mlp.down_proj", WIDTH)):
            shapes[f"{layer}{module}.weight"] = (HIDDEN, columns)
            shapes[f"{layer}{module}.bias"] = (HIDDEN,)
    return {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def fuse(arrays: Arrays) -> Arrays:
    """The same with q, k and v in one tensor, and gate and up in another."""
    result = dict(arrays)
    for i in range(LAYERS):
        for fused, names in FUSED.items():
            for param in ("weight", "bias"):
                parts = [result.pop(f"model.layers.{i}.{name}.{param}") for name in names]
                result[f"model.layers.{i}.{fused}.{param}"] = np.concatenate(parts)
    return result


def fused_map() -> dict:
    """The map of llama for `fuse`."""
    raw = json.loads(Path(find_map("llama").file).read_text())
    layer = raw["layer_weights"]
    for fused, names in FUSED.items():
        for param in ("weight", "bias"):
            entries = [layer.pop(f"model.layers.{{layer}}.{name}.{param}") for name in names]
            targets = [entry["mtj"] for entry in entries]
            layer[f"model.layers.{{layer}}.{fused}.{param}"] = {"split_rows": targets}
    return raw


@pytest.fixture
def map_file(tmp_path: Path) -> Path:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(fused_map()))
    return path


def write(folder: Path, arrays: Arrays) -> Path:
    return write_checkpoint(folder, {"model.safetensors": arrays}, CONFIG)


@pytest.mark.parametrize("transposed_linear", [False, True])
@pytest.mark.parametrize("mesh", MESHES)
def test_a_fused_checkpoint_loads_like_a_separate_one(
    mesh: str, transposed_linear: bool, tmp_path: Path, map_file: Path
) -> None:
    fused, apart = write(tmp_path / "f", fuse(separate())), write(tmp_path / "s", separate())
    found = mtj_loader.load(fused, mesh, map=map_file, transposed_linear=transposed_linear)
    expected = mtj_loader.load(apart, mesh, transposed_linear=transposed_linear)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert found.report.bytes_read == found.report.bytes_needed == expected.report.bytes_needed
    assert verify(found.plan, found.params)


def test_the_plan_shows_the_rows_of_each_part(tmp_path: Path, map_file: Path) -> None:
    plan = mtj_loader.plan(write(tmp_path / "f", fuse(separate())), "mp=1", map=map_file)
    query, key = (
        next(p for p in plan.params if (p.spec.module, p.spec.param) == (f"layer_0/~/{name}", "w"))
        for name in ("linear", "linear_2")
    )
    rows = query.view.records[0].shape[0]
    for param in (query, key):
        assert str(param.changes) == f"transposed, {param.spec.shape[1]} of {rows} rows"
    assert f"{query.spec.shape[1]} of {rows} rows" in plan.summary()


SIZES = {"d": 5, "h": 8, "g": 2, "k": 3}
SPECS = [
    ParamSpec("m/~/q", "w", axes("d (h k)", SIZES), "h"),
    ParamSpec("m/~/k", "w", axes("d (g k)", SIZES), "g"),
    ParamSpec("m/~/v", "w", axes("d (g k)", SIZES), "g"),
]


def resolve_qkv(shape: tuple[int, ...], entry: object, specs: list[ParamSpec] = SPECS):
    raw = {
        "mtj_compat": "llama",
        "mtj_pe": "neox_rotary",
        "mtj_config_map": {"layers": "l", "d_model": "d", "n_heads": "h"},
        "static_weights": {"qkv": entry},
        "layer_weights": {},
    }
    index = TensorIndex({"qkv": TensorRecord("qkv", "f", 0, "F32", shape)}, {})
    context = TransformContext(1, 0, transposed_linear=False)
    return resolve(parse_map(raw, file="m.json"), index, specs, context, layers=0)


def split(*modules: str) -> dict:
    return {"split_rows": [{"module": module, "param": "w"} for module in modules]}


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_views_of_grouped_queries_equal_numpy(shards: int) -> None:
    data = {"qkv": np.arange(36.0 * 5).reshape(36, 5)}
    bindings = resolve_qkv((36, 5), split("m/~/q", "m/~/k", "m/~/v")).bindings
    for binding, (start, stop) in zip(bindings, [(0, 24), (24, 30), (30, 36)], strict=True):
        spec, whole = binding.spec, data["qkv"][start:stop].T
        np.testing.assert_array_equal(materialize(binding.view, data), whole)
        layouts = shard_layouts(binding.view.layout, spec.groups, spec.split, shards)
        heads = whole.reshape(5, -1, 3)
        for j, layout in enumerate(layouts):
            part = spec.groups[1][0].part(shards)
            first = j * heads.shape[1] // shards
            shard = materialize(binding.view.with_layout(layout), data)
            np.testing.assert_array_equal(shard, heads[:, first : first + part])


def test_the_order_of_the_parts_is_that_of_the_rows() -> None:
    data = {"qkv": np.arange(36.0 * 5).reshape(36, 5)}
    q, k, v = resolve_qkv((36, 5), split("m/~/v", "m/~/q", "m/~/k")).bindings
    for binding, rows in ((q, slice(6, 30)), (k, slice(30, 36)), (v, slice(0, 6))):
        np.testing.assert_array_equal(materialize(binding.view, data), data["qkv"][rows].T)


def test_a_fused_tensor_of_another_shape_is_one_problem() -> None:
    with pytest.raises(CheckpointMismatchError) as caught:
        resolve_qkv((35, 5), split("m/~/q", "m/~/k", "m/~/v"))
    assert caught.value.problems == (
        Problem(
            "the shape does not fit the model that config.json describes",
            "f",
            "qkv",
            "m/~/q w, m/~/k w, m/~/v w",
            "[36, 5], 24 + 6 + 6 rows",
            "[35, 5]",
        ),
    )


def test_a_part_that_the_model_does_not_have_is_named() -> None:
    with pytest.raises(CheckpointMismatchError) as caught:
        resolve_qkv((36, 5), split("m/~/q", "m/~/k", "m/~/x"), SPECS[:2])
    (problem,) = caught.value.problems
    assert problem.what == "the model that config.json describes has no such parameter"
    assert problem.target == "m/~/x w"


def test_a_parameter_that_is_listed_twice_is_refused() -> None:
    with pytest.raises(CheckpointMismatchError, match="two tensors for one parameter"):
        resolve_qkv((42, 5), split("m/~/q", "m/~/k", "m/~/k", "m/~/v"))


def test_parts_of_different_widths_are_refused() -> None:
    wide = ParamSpec("m/~/w", "w", axes("d (h k)", SIZES | {"d": 7}), "h")
    with pytest.raises(MapError, match=r"different widths(.|\n)*\[24, 5\], \[24, 7\]"):
        resolve_qkv((48, 5), split("m/~/q", "m/~/w"), [SPECS[0], wide])


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (split("m/~/q"), "at least two parameters"),
        ({"split_rows": {}}, "a list"),
        ({"split_rows": [3, 4]}, r"not an object(.|\n)*split_rows\[0\]"),
        (split("m/~/q", "m/~/k") | {"mtj": {"module": "m/~/v", "param": "w"}}, "unknown key"),
        (split("m/~/q", "m/~/{layer}"), "not a module path"),
    ],
)
def test_a_malformed_split_is_refused(entry: dict, words: str) -> None:
    with pytest.raises(MapError, match=words):
        resolve_qkv((36, 5), entry)


TERMS = linear("model.layers.0.self_attn.qkv_proj", Q + 2 * KV, HIDDEN, seed=1) | linear(
    "model.layers.1.mlp.gate_up_proj", 2 * WIDTH, HIDDEN, seed=2
)


@pytest.mark.parametrize("transposed_linear", [False, True])
@pytest.mark.parametrize("mesh", MESHES)
def test_an_adapter_of_a_fused_tensor_is_split_like_it(
    mesh: str, transposed_linear: bool, tmp_path: Path, map_file: Path
) -> None:
    base = write(tmp_path / "base", fuse(separate()))
    by_hand = write(tmp_path / "hand", merged(fuse(separate()), TERMS, 5 / 3))
    adapter = write_adapter(tmp_path / "a", TERMS)
    options = {"map": map_file, "transposed_linear": transposed_linear}
    found = mtj_loader.load(base, mesh, dtype="float32", adapter=adapter, **options)
    expected = mtj_loader.load(by_hand, mesh, dtype="float32", **options)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6),
        found.params,
        expected.params,
    )
    assert found.report.bytes_read == found.report.bytes_needed
    assert verify(found.plan, found.params)


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path, map_file: Path) -> None:
    terms = linear("model.layers.0.self_attn.qkv_proj", Q, HIDDEN)
    adapter = write_adapter(tmp_path / "a", terms)
    with pytest.raises(AdapterMismatchError, match=r"another shape(.|\n)*48, 16(.|\n)*24, 16"):
        mtj_loader.plan(write(tmp_path / "b", fuse(separate())), map=map_file, adapter=adapter)
