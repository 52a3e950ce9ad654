"""Resharding: blocks become, bit for bit, the shards that devices would have read themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

import mtj_loader
from mtj_loader import LoadPlan
from mtj_loader.distributed.hosts import Hosts
from mtj_loader.errors import HostError
from mtj_loader.formats.records import TensorRecord
from mtj_loader.loading import buffers, load_params
from mtj_loader.loading.placement import Params
from mtj_loader.loading.reshard import reshard, reshard_param
from mtj_loader.loading.verify import verify
from mtj_loader.planning.assignments import SharedBlocks
from mtj_loader.planning.topology import topology
from mtj_loader.storage.base import ReadCosts
from mtj_loader.storage.local import DISK
from mtj_loader.storage.object_store import OBJECT_STORE
from mtj_loader.weights.view import view_of
from tests.planning.test_assign_reads import plan_of
from tests.support import neox

DATA = Path(__file__).parents[1] / "data"
GROUPED = DATA / "families/llama/llama_3"  # two key-value heads for eight heads
MESHES = ["dp=2,mp=4", "dp=4,mp=2", "dp=1,mp=8"]


def shared(folder: Path, mesh: str, hosts: int, speed: ReadCosts, **options: Any) -> LoadPlan:
    """The plan of several hosts, with all devices in this process."""
    plan = plan_of(folder, mesh, hosts, speed, **options)
    return replace(plan, topology=topology(mtj_loader.make_mesh(mesh)))


def loaded(plan: LoadPlan, **options: Any) -> tuple[Params, mtj_loader.LoadReport]:
    return load_params.load_params(plan, mtj_loader.make_mesh(str(plan.topology)), **options)


def assert_equal(found: Params, expected: Params) -> None:
    """Checks that all bits, dtypes and shardings are equal."""

    def same(one: jax.Array, other: jax.Array) -> None:
        assert (one.dtype, one.sharding) == (other.dtype, other.sharding)
        pairs = zip(one.addressable_shards, other.addressable_shards, strict=True)
        for mine, theirs in pairs:
            assert mine.device == theirs.device
            assert np.asarray(mine.data).tobytes() == np.asarray(theirs.data).tobytes()

    jax.tree.map(same, found, expected)


LLAMA = (GROUPED, "bfloat16", False)
TRANSPOSED = (GROUPED, "float32", True)
MIXTRAL = (DATA / "families/mixtral/published", "float32", False)
GPTJ = (DATA / "goldens/gptj", "float16", False)


@pytest.mark.parametrize(
    ("folder", "dtype", "transposed_linear", "mesh", "speed"),
    [
        *((*LLAMA, mesh, speed) for mesh in MESHES for speed in (DISK, OBJECT_STORE)),
        *((*TRANSPOSED, mesh, OBJECT_STORE) for mesh in MESHES),
        *((*MIXTRAL, "dp=2,mp=4", speed) for speed in (DISK, OBJECT_STORE)),
        *((*GPTJ, "dp=1,mp=8", speed) for speed in (DISK, OBJECT_STORE)),
    ],
)
def test_parameters_equal_those_of_a_load_without_exchange(
    folder: Path, dtype: str, transposed_linear: bool, mesh: str, speed: ReadCosts
) -> None:
    options = {"dtype": dtype, "transposed_linear": transposed_linear}
    plan = shared(folder, mesh, 4, speed, **options)
    assert any(param.assignment.is_shared for param in plan.params)
    params, report = loaded(plan)
    assert report.bytes_read == report.bytes_needed
    assert_equal(params, loaded(plan.without_exchange)[0])


def test_nan_payloads_and_signs_of_zeros_are_kept(tmp_path: Path) -> None:
    """They would not survive a sum or a change of dtype."""
    arrays = neox.tensors(ml_dtypes.bfloat16)
    odd = np.array([0x8000, 0x7FC1, 0xFF81, 0x0001], np.uint16).view(ml_dtypes.bfloat16)
    for name, array in arrays.items():
        if array.ndim == 2:  # biases are divided
            arrays[name] = np.resize(odd, array.shape)
    folder = neox.write(tmp_path, arrays)
    for speed in (DISK, OBJECT_STORE):
        plan = shared(folder, "dp=2,mp=4", 4, speed)
        assert_equal(loaded(plan)[0], loaded(plan.without_exchange)[0])
        verify(replace(plan, options=replace(plan.options, allow_nonfinite=True)), loaded(plan)[0])


def test_divided_blocks_give_equal_parameters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on accelerators, with less staging memory than one block needs."""
    fresh = buffers.allocate
    monkeypatch.setattr(
        buffers, "allocate", lambda size: fresh(size + 4)[4:]
    )  # misaligned, so never adopted
    plan = shared(neox.write(tmp_path), "dp=1,mp=4", 2, OBJECT_STORE)
    assignments = [param.assignment for param in plan.params]
    assert {one.is_mixed for one in assignments if isinstance(one, SharedBlocks)} == {True, False}
    staged, report = loaded(plan, buffers=buffers.StagingBuffers(128))
    assert report.bytes_read == report.bytes_needed
    assert_equal(staged, loaded(plan.without_exchange)[0])


@pytest.mark.parametrize("mesh", ["dp=2,mp=4", "dp=4,mp=2", "dp=2,mp=2"])
@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("repeats", [1, 2])
def test_plan_and_sharding_number_the_blocks_in_the_same_order(
    mesh: str, is_mixed: bool, repeats: int
) -> None:
    """Otherwise hosts would place other blocks than they read."""
    devices = mtj_loader.make_mesh(mesh)
    layout = view_of(TensorRecord("t", "f", 0, "F32", (24, 3))).layout
    shards = devices.shape["mp"] // repeats
    reads = SharedBlocks((layout,) * shards, devices.shape["dp"], repeats, 0, is_mixed)
    indices = reads.sharding(devices).devices_indices_map(reads.array_shape)
    for device_index, device in enumerate(devices.devices.flat):
        assert reads.block_of_device(device_index) == reads.block_at(indices[device])


def test_blocks_are_deleted(tmp_path: Path) -> None:
    plan = shared(neox.write(tmp_path), "dp=2,mp=4", 2, DISK)
    mesh = mtj_loader.make_mesh("dp=2,mp=4")
    for param in plan.params:
        assert param.assignment.is_shared
        read = jax.device_put(
            np.zeros(param.assignment.array_shape, param.dtype), param.assignment.sharding(mesh)
        )
        resharded = reshard_param(param, read, mesh)
        assert read.is_deleted()
        assert resharded.shape == param.array_shape


def test_nothing_is_exchanged_when_another_host_failed(tmp_path: Path) -> None:
    plan = shared(neox.write(tmp_path), "dp=2,mp=4", 2, DISK)
    with pytest.raises(HostError, match="host 1 failed"):
        reshard({}, plan, mtj_loader.make_mesh("dp=2,mp=4"), Failing())


class Failing(Hosts):
    """A group in which another host has failed."""

    def check(self) -> None:
        raise HostError("host 1 failed", host=1, exit_code=4)


def test_own_shards_are_not_exchanged(tmp_path: Path) -> None:
    plan = mtj_loader.plan(neox.write(tmp_path), "mp=2")
    reshard({}, plan, mtj_loader.make_mesh("mp=2"), Failing())
    _, report = loaded(plan)
    assert report.seconds["exchange"] >= 0


def test_layers_share_a_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    traced: list[object] = []
    original: Callable = jax.lax.all_gather
    monkeypatch.setattr(
        jax.lax, "all_gather", lambda *a, **k: traced.append(a) or original(*a, **k)
    )
    plan = shared(neox.write(tmp_path), "dp=4,mp=2", 2, DISK)
    loaded(plan)
    assert len(plan.params) == 28
    assert len(traced) <= 14  # one per kind of parameter; there are two layers
