"""Loading: parameters are bit-exact, no byte is read twice, every fault is one clear error."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh

import mtj_loader
from mtj_loader.errors import (
    CheckpointError,
    DeviceError,
    MeshError,
    NonFiniteError,
    StorageError,
    UsageError,
    VerifyError,
)
from mtj_loader.loading import buffers, load_params
from mtj_loader.loading.verify import verify
from mtj_loader.planning.topology import as_mesh
from tests.support import neox

DATA = Path(__file__).parents[1] / "data"
FIXTURE = DATA / "shakespeare-neox"
GOLDENS = [
    "gpt_neox", "gpt_neox_serial", "gptj", "gpt_neo", "opt", "xglm", "bloom",
]  # fmt: skip

Tree = dict[str, dict[str, np.ndarray]]


def tree_of(model: mtj_loader.Model) -> Tree:
    return {m: {p: np.asarray(a) for p, a in ps.items()} for m, ps in model.params.items()}


def fingerprints(tree: Tree) -> dict:
    """The shape and digest of each array, in the format of mtj_tree.json."""
    return {
        module: {
            param: {
                "shape": list(array.shape),
                "sha256": hashlib.sha256(array.astype("<f4").tobytes()).hexdigest(),
            }
            for param, array in params.items()
        }
        for module, params in tree.items()
    }


@pytest.mark.parametrize("transposed_linear", [False, True], ids=["default", "transposed"])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("golden", GOLDENS)
def test_trees_equal_those_of_mesh_transformer_jax(
    golden: str, shards: int, transposed_linear: bool
) -> None:
    trees = json.loads((DATA / "goldens" / golden / "mtj_tree.json").read_text())
    expected = trees[f"shards={shards},transposed_linear={str(transposed_linear).lower()}"]
    folder = DATA / "goldens" / golden
    options = {"transposed_linear": transposed_linear}
    model = mtj_loader.load(folder, f"mp={shards}", dtype="float32", **options)
    tree = tree_of(model)
    assert fingerprints(tree) == expected

    rounded = tree_of(mtj_loader.load(folder, f"mp={shards}", **options))
    for module, params in tree.items():
        for param, array in params.items():
            nearest = to_nearest_even(array)
            np.testing.assert_array_equal(rounded[module][param].view(np.uint16), nearest)


def to_nearest_even(array: np.ndarray) -> np.ndarray:
    """The bits of float32 values in bfloat16, rounded to nearest even by the definition."""
    bits = array.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("transposed_linear", [False, True])
def test_loaded_parameters_have_the_shapes_that_the_model_declares(
    shards: int, transposed_linear: bool
) -> None:
    model = mtj_loader.load(FIXTURE, f"mp={shards}", transposed_linear=transposed_linear)
    declared = model.forward.param_shapes()
    found = jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding.spec), model.params)
    assert found == jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding.spec), declared)


@pytest.mark.parametrize("shards", [3, 6])
def test_biases_are_divided_by_the_shards_in_float32(shards: int, tmp_path: Path) -> None:
    arrays = neox.tensors()
    arrays = {k: np.resize(v, shape_for_six(k, v.shape)) for k, v in arrays.items()}
    folder = neox.write(
        tmp_path, arrays, num_attention_heads=6, hidden_size=30, intermediate_size=42
    )
    model = mtj_loader.load(folder, f"mp={shards}", dtype="float32")
    for layer in range(2):
        bias = arrays[f"gpt_neox.layers.{layer}.mlp.dense_4h_to_h.bias"]
        quotient = (bias.astype(np.float64) / shards).astype(np.float32)  # exact: see test_copies
        found = model.params[f"causal_transformer_shard/~/layer_{layer}/~/linear_5"]["b"]
        np.testing.assert_array_equal(found, np.tile(quotient, (shards, 1)))


def shape_for_six(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    sizes = {24: 30, 72: 90, 40: 42, 29: 29}
    return tuple(sizes[n] for n in shape)


def meshes() -> dict[str, Mesh | str | None]:
    devices = np.array(jax.devices())
    return {
        "text": "dp=2,mp=4",
        "explicit-axes": jax.make_mesh((2, 4), ("dp", "mp")),
        "auto-axes": jax.make_mesh((2, 4), ("dp", "mp"), axis_types=(AxisType.Auto,) * 2),
        "other-order": Mesh(devices.reshape(4, 2), ("mp", "dp")),
        "backwards": Mesh(devices[::-1].reshape(2, 4), ("dp", "mp")),
        "only-mp": Mesh(devices[:4], ("mp",)),
        "one-device": Mesh(devices[5:6], ("mp",)),
        "none": None,
    }


@pytest.mark.parametrize("name", meshes())
def test_any_mesh_holds_the_same_parameters(name: str) -> None:
    mesh = meshes()[name]
    model = mtj_loader.load(FIXTURE, mesh)
    verify(model.plan, model.params)
    if isinstance(mesh, Mesh):
        assert {d.id for d in model.mesh.devices.flat} == {d.id for d in mesh.devices.flat}
    embedding = model.params["causal_transformer_shard/~/embedding_shard/~/linear"]["w"]
    merged = np.asarray(embedding).reshape(-1, 192)[:3003]
    one = mtj_loader.load(FIXTURE, "mp=1").params
    np.testing.assert_array_equal(merged, np.asarray(next(iter(one.values()))["w"])[0])


def test_the_default_mesh_has_all_devices_that_the_model_can_use(tmp_path: Path) -> None:
    assert mtj_loader.load(FIXTURE).mesh.shape == {"dp": 1, "mp": 8}
    assert mtj_loader.load(neox.write(tmp_path)).mesh.shape == {"dp": 1, "mp": 4}  # 4 heads


@pytest.mark.parametrize(
    ("transposed_linear", "section_bytes", "dtype"),
    [(False, 2048, "float32"), (True, 2048, "bfloat16"), (False, 1 << 20, "float32")],
)
def test_staging_memory_in_blocks_gives_equal_parameters(
    transposed_linear: bool, section_bytes: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on accelerators: memory is reused, and larger shards are assembled on the device."""
    golden = DATA / "goldens/gpt_neox"
    plan = mtj_loader.plan(golden, "dp=2,mp=4", dtype=dtype, transposed_linear=transposed_linear)
    mesh = mtj_loader.make_mesh("dp=2,mp=4")
    expected, _ = load_params.load_params(plan, mesh)
    # The CPU backend copies misaligned buffers, like accelerators, instead of adopting them.
    fresh = buffers.allocate
    monkeypatch.setattr(buffers, "allocate", lambda size: fresh(size + 4)[4:])
    staged, report = load_params.load_params(
        plan, mesh, buffers=buffers.StagingBuffers(section_bytes)
    )
    assert report.bytes_read == report.bytes_needed
    jax.tree.map(np.testing.assert_array_equal, staged, expected)


def test_staging_memory_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    fresh = buffers.allocate

    def counted(size: int) -> np.ndarray:
        sizes.append(size)
        return fresh(size + 4)[4:]

    monkeypatch.setattr(buffers, "allocate", counted)
    plan = mtj_loader.plan(FIXTURE, "mp=8")
    staging = buffers.StagingBuffers(200_000)
    load_params.load_params(plan, mtj_loader.make_mesh("mp=8"), buffers=staging)
    assert len(sizes) <= 3  # one is read, one is complete, one is copied
    assert max(sizes) <= 200_000


def test_a_plan_needs_no_device_and_reads_no_weights(tmp_path: Path) -> None:
    """The mesh is abstract, and planning reads only headers."""
    folder = neox.write(tmp_path)
    pod = mtj_loader.make_abstract_mesh("dp=64,mp=4", hosts=32)
    plan = mtj_loader.plan(folder, pod)
    assert plan.topology.host_ids == tuple(range(32))
    assert len(plan.topology.shards_of(0)) == 4
    abstract = mtj_loader.plan(folder, AbstractMesh((2, 4), ("dp", "mp")))
    assert (abstract.topology.dp, abstract.topology.mp) == (2, 4)


def test_every_byte_is_needed_by_exactly_one_host(tmp_path: Path) -> None:
    pod = mtj_loader.make_abstract_mesh("mp=4", hosts=4)
    plan = mtj_loader.plan(neox.write(tmp_path), pod)
    per_host = [plan.host_bytes(host) for host in range(4)]
    everything = sum(a.nbytes for a in neox.tensors().values())
    assert sum(per_host) == everything
    assert max(per_host) < everything / 2
    alone = [plan.without_exchange.host_bytes(host) for host in range(4)]
    whole = ("norm.weight", "norm.bias", "dense.bias", "4h_to_h.bias")  # on every shard
    replicated = sum(a.nbytes for name, a in neox.tensors().items() if name.endswith(whole))
    assert sum(alone) == everything + 3 * replicated


def test_a_plan_can_be_loaded() -> None:
    mesh = Mesh(np.array(jax.devices())[[6, 2]], ("mp",))
    plan = mtj_loader.plan(FIXTURE, mesh)
    model = mtj_loader.load(plan=plan)
    assert [d.id for d in model.mesh.devices.flat] == [6, 2]
    verify(plan, model.params)


def test_replicas_do_not_read_twice(tmp_path: Path) -> None:
    report = mtj_loader.load(neox.write(tmp_path), "dp=2,mp=4").report
    assert report.bytes_read == report.bytes_needed
    assert report.bytes_needed == sum(a.nbytes for a in neox.tensors().values())


def test_the_report_as_json_and_as_text() -> None:
    report = mtj_loader.load(FIXTURE, "mp=8").report
    again = json.loads(json.dumps(report.to_dict()))
    assert again["bytes_read"] == again["bytes_needed"] == 7645440
    assert set(again["seconds"]) >= {"plan", "load", "read", "transform", "device"}
    assert "76 parameters, 7.65 MB read" in str(report)


def test_verify_finds_a_wrong_bit() -> None:
    model = mtj_loader.load(FIXTURE, "mp=4")
    assert verify(model.plan, model.params) == 4 * model.report.device_bytes
    at = "causal_transformer_shard/~/layer_3/~/linear_4"
    array = model.params[at]["w"]
    bits = np.asarray(array).view(np.uint16).copy()
    bits[2, 5, 7] ^= 1
    broken = jax.device_put(bits.view(ml_dtypes.bfloat16), array.sharding)
    params = model.params | {at: model.params[at] | {"w": broken}}
    with pytest.raises(VerifyError, match=r"1 elements(.|\n)*layers\.3(.|\n)*element \(0, 5, 7\)"):
        verify(model.plan, params)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_check_finite_finds_nonfinite_weights(value: float, tmp_path: Path) -> None:
    arrays = neox.tensors()
    arrays["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"][3, 4] = value
    folder = neox.write(tmp_path, arrays)
    with pytest.raises(NonFiniteError, match=r"1 weights in 1 tensors .*\n  file: .*\n.*dense_h"):
        mtj_loader.load(folder, "mp=2", check_finite=True)
    allowed = mtj_loader.load(folder, "mp=2", check_finite=True, allow_nonfinite=True)
    assert allowed.report.finite is False
    assert mtj_loader.load(folder, "mp=2").report.finite is None  # not scanned
    with pytest.raises(NonFiniteError, match=r"file: .*safetensors\n  tensor: .*dense_h_to_4h"):
        verify(mtj_loader.plan(folder, "mp=2"), allowed.params)


def test_finite_weights_that_overflow_in_float16_are_rejected(tmp_path: Path) -> None:  # E81
    arrays = neox.tensors()
    arrays["embed_out.weight"][28, 0] = 1e5
    folder = neox.write(tmp_path, arrays)
    with pytest.raises(NonFiniteError, match=r"overflow .* float16\n  file: .*\n(.|\n)*embed_out"):
        mtj_loader.load(folder, "mp=2", dtype="float16")
    assert mtj_loader.load(folder, "mp=2", dtype="float32").report.finite is None


def test_a_file_that_changed_after_planning_is_rejected(tmp_path: Path) -> None:  # A27
    folder = neox.write(tmp_path)
    plan = mtj_loader.plan(folder, "mp=2")
    neox.write(tmp_path, neox.tensors(seed=1))
    with pytest.raises(CheckpointError, match=r"changed(.|\n)*model\.safetensors"):
        mtj_loader.load(plan=plan)


def test_a_file_that_was_deleted_after_planning_is_named(tmp_path: Path) -> None:
    folder = neox.write(tmp_path)
    plan = mtj_loader.plan(folder, "mp=2")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing(.|\n)*model\.safetensors"):
        mtj_loader.load(plan=plan)


def test_a_read_error_stops_all_threads_and_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = mtj_loader.plan(neox.write(tmp_path), "mp=2")

    def fail(path: str, offset_bytes: int, buffer: object) -> None:
        raise StorageError(f"a read at byte {offset_bytes:,} failed", file=path)

    monkeypatch.setattr(plan.checkpoint.storage, "read_into", fail)
    before = set(threading.enumerate())
    with pytest.raises(StorageError, match=r"a read at byte [\d,]+ failed"):
        mtj_loader.load(plan=plan)
    assert set(threading.enumerate()) <= before


def test_an_interrupt_stops_all_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = mtj_loader.plan(neox.write(tmp_path), "mp=2")

    def interrupt(path: str, offset_bytes: int, buffer: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan.checkpoint.storage, "read_into", interrupt)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        mtj_loader.load(plan=plan)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("mesh", "error", "words"),
    [
        ("mp=3", MeshError, r"3 shards do not divide the model: (.|\n)*one of 1, 2, 4"),
        ("mp=16", MeshError, r"16 shards"),
        ("dp=4,mp=4", DeviceError, r"needs more devices(.|\n)*16(.|\n)*8 \(cpu\)"),
        ("mp=0", MeshError, r"cannot read the mesh"),
        ("tp=2", MeshError, r"cannot read the mesh(.|\n)*tp=2"),
        ("mp=1,mp=2", MeshError, r"names mp twice"),
        (5, MeshError, r"not a mesh(.|\n)*5"),
    ],
)
def test_an_invalid_mesh_is_rejected(mesh: str, error: type, words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        mtj_loader.load(neox.write(tmp_path), mesh)


def test_a_mesh_with_other_axes_is_rejected(tmp_path: Path) -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    with pytest.raises(MeshError, match=r"axes dp and mp(.|\n)*found: x"):
        mtj_loader.load(neox.write(tmp_path), mesh)
    with pytest.raises(MeshError, match="axes dp and mp"):
        as_mesh(mesh)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float8"}, "unknown dtype"),
        ({"dtype": []}, "unknown dtype"),
        ({"host_memory": "63MiB"}, "host_memory is too small"),
        ({"host_memory": "much"}, "cannot read a size"),
    ],
)
def test_invalid_options_are_rejected(options: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        mtj_loader.load(FIXTURE, "mp=2", **options)


@pytest.mark.parametrize("path", [5, "", b"model"])
def test_an_invalid_path_is_rejected(path: object) -> None:
    with pytest.raises(UsageError, match="not a checkpoint's path"):
        mtj_loader.load(path, "mp=2")


def test_load_needs_a_path_or_a_plan() -> None:
    with pytest.raises(UsageError, match="either a path or a plan"):
        mtj_loader.load()


def test_the_minimum_host_memory_works() -> None:
    assert mtj_loader.load(FIXTURE, "mp=8", host_memory="64MiB").report.bytes_read == 7645440
