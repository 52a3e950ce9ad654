"""Read assignments: for every mesh, host count and storage, one host reads each byte."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import mtj_loader
from mtj_loader import LoadPlan
from mtj_loader.errors import MeshError
from mtj_loader.formats.records import TensorRecord
from mtj_loader.loading.schedule import list_byte_ranges, list_targets
from mtj_loader.parameters import axes
from mtj_loader.planning.assignments import ReadAssignment, SharedBlocks, distinct, slowest_axis
from mtj_loader.planning.param_plan import ParamPlan, with_reads
from mtj_loader.storage.base import ReadCosts
from mtj_loader.storage.local import DISK
from mtj_loader.storage.object_store import OBJECT_STORE
from mtj_loader.weights.copies import shard_layouts, source_elements
from mtj_loader.weights.view import Layout, View, view_of, zeros
from tests.support import neox
from tests.weights.test_view import materialize

DATA = Path(__file__).parents[1] / "data"
MODELS = [
    DATA / "goldens/gpt_neox",
    DATA / "goldens/gptj",  # has zeros that come from no file
    DATA / "goldens/opt",
    DATA / "families/llama/llama_3",  # two key-value heads
    DATA / "families/llama/yarn_tied",
    DATA / "families/mixtral/published",
    DATA / "families/mpt/mpt_7b",
]


def plan_of(folder: Path, mesh: str, hosts: int, speed: ReadCosts, **options: Any) -> LoadPlan:
    pod = mtj_loader.make_abstract_mesh(mesh, hosts=hosts)
    plan = mtj_loader.plan(folder, pod, **options)
    params = with_reads(plan.without_exchange.params, plan.topology, speed)
    return replace(plan, params=params)


def reads(plan: LoadPlan, host: int, section_bytes: int | None = None) -> dict[str, np.ndarray]:
    """How often one host reads every byte of every file, from the schedule of a load."""
    files = plan.checkpoint.index.files.values()
    counts = {stamp.path: np.zeros(stamp.size_bytes + 1, np.int64) for stamp in files}
    for file, start, stop in list_byte_ranges(list_targets(plan, host, section_bytes)):
        counts[file][start] += 1
        counts[file][stop] -= 1
    return {file: np.cumsum(count) for file, count in counts.items()}


MESHES = [(1, 1), (1, 2), (1, 4), (1, 6), (1, 8), (2, 3), (2, 4), (3, 2), (3, 4), (4, 1), (4, 8)]


@settings(max_examples=50)
@given(
    st.sampled_from(MODELS),
    st.sampled_from(MESHES),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([DISK, OBJECT_STORE]),
    st.tuples(st.booleans(), st.sampled_from([None, 512])),
)
def test_all_hosts_together_read_what_one_would(
    folder: Path,
    shape: tuple[int, int],
    hosts: int,
    speed: ReadCosts,
    options: tuple[bool, int | None],
) -> None:
    (dp, mp), (transposed_linear, section_bytes) = shape, options
    assume(dp * mp % hosts == 0)
    mesh = f"dp={dp},mp={mp}"
    try:
        plan = plan_of(folder, mesh, hosts, speed, transposed_linear=transposed_linear)
    except MeshError:
        assume(False)
        raise
    alone = plan_of(folder, mesh, 1, speed, transposed_linear=transposed_linear)
    each = [reads(plan, host, section_bytes) for host in range(hosts)]
    whole = reads(alone, 0)
    for file, expected in whole.items():
        np.testing.assert_array_equal(sum(counts[file] for counts in each), expected)
    for host, counts in enumerate(each):
        planned = plan.host_bytes(host) - (plan._comparison_bytes if host == 0 else 0)
        assert planned == sum(count.sum() for count in counts.values())
    assert sum(plan.bytes_of_hosts.values()) == alone.host_bytes(0)


def test_on_local_files_a_host_reads_no_more_than_it_holds(tmp_path: Path) -> None:
    plan = plan_of(neox.write(tmp_path), "dp=2,mp=4", 4, DISK)
    for host in range(4):
        own = reads(plan.without_exchange, host)["model.safetensors"]
        assert (reads(plan, host)["model.safetensors"] <= own).all()


def test_a_host_reads_itself_what_it_alone_holds(tmp_path: Path) -> None:
    plan = plan_of(neox.write(tmp_path), "mp=4", 2, DISK)
    shared = {param.spec.param for param in plan.params if param.assignment.is_shared}
    assert shared == {"scale", "offset", "b"}
    split = [p for p in plan.params if p.spec.split is not None]
    assert not any(param.assignment.is_shared for param in split)
    assert not any(
        p.assignment.is_shared for p in plan_of(tmp_path, "dp=2,mp=4", 1, OBJECT_STORE).params
    )


def test_equal_shards_on_one_host_are_not_divided() -> None:
    """Of eight shards, four and four hold the same key-value head."""
    folder = DATA / "families/llama/llama_3"
    kv = "layer_0/~/linear_1"
    two = {p.spec.module: p for p in plan_of(folder, "mp=8", 2, DISK).params}
    four = {p.spec.module: p for p in plan_of(folder, "mp=8", 4, DISK).params}
    assert not two[kv].assignment.is_shared
    blocks = four[kv].assignment
    assert isinstance(blocks, SharedBlocks)
    assert (blocks.repeats, len(blocks.shards)) == (4, 2)


def test_ranges_of_rows_are_read_in_blocks_if_requests_are_expensive(tmp_path: Path) -> None:
    """A host's part of `dense_4h_to_h` is a range in each of 24 rows; its block is one range."""
    folder = neox.write(tmp_path)
    name = "layer_0/~/linear_5"

    def down(speed: ReadCosts) -> tuple[ReadAssignment, list[int]]:
        plan = plan_of(folder, "mp=4", 2, speed)
        one = replace(plan, params=tuple(p for p in plan.params if p.spec.module == name)[:1])
        assert one.params[0].spec.param == "w"
        runs = [list(list_byte_ranges(list_targets(one, host, None))) for host in range(2)]
        return one.params[0].assignment, [len(run) for run in runs]

    reads, requests = down(OBJECT_STORE)
    assert isinstance(reads, SharedBlocks)
    assert reads.is_mixed
    assert requests == [1, 1]
    reads, requests = down(DISK)
    assert not reads.is_shared
    assert requests == [24, 24]


def test_a_host_receives_what_it_holds_but_has_not_read(tmp_path: Path) -> None:
    for speed in (DISK, OBJECT_STORE):
        plan = plan_of(neox.write(tmp_path), "dp=2,mp=4", 4, speed)
        for host in range(4):
            device_indices = plan.topology.device_indices_of(host)
            for param in plan.params:
                expected = held_elsewhere(param, device_indices)
                assert (
                    param.received_bytes(device_indices) == expected * param.source_dtype.itemsize
                )


def held_elsewhere(param: ParamPlan, device_indices: tuple[int, ...]) -> int:
    """Elements of the file that devices hold and none of them reads, counted one by one."""
    if not param.assignment.is_shared:
        return 0
    read = {e for layout in distinct(param.assignment, device_indices) for e in elements(layout)}
    held = {
        e
        for device_index in device_indices
        for e in elements(param.shards[device_index % len(param.shards)])
    }
    return len(held - read)


def elements(layout: Layout) -> set[tuple[int, int]]:
    """Every element that a layout takes: record and number."""
    found = set()
    for piece in layout.pieces:
        if piece.source >= 0:
            for at in np.ndindex(piece.shape):
                step = sum(i * s for i, s in zip(at, piece.strides, strict=True))
                found.add((piece.source, piece.offset + step))
    return found


RECORD = TensorRecord("t", "f", 0, "F32", ())


def filled(layout: Layout, source: np.ndarray) -> np.ndarray:
    return materialize(View(layout, (RECORD,)), {RECORD.name: source})


def shards_of(rows: int, columns: int, split: str | None, shards: int) -> tuple[Layout, ...]:
    layout = view_of(replace(RECORD, shape=(rows, columns))).layout
    return shard_layouts(layout, axes("a b", {"a": rows, "b": columns}), split, shards)


@given(
    st.tuples(st.integers(1, 12), st.sampled_from([4, 8])),
    st.sampled_from(["b", None]),
    st.integers(1, 3),
    st.integers(0, 1),
    st.booleans(),
)
def test_blocks_together_are_the_padded_shards(
    shape: tuple[int, int], split: str | None, replicas: int, axis: int, is_mixed: bool
) -> None:
    rows, columns = shape
    layouts = shards_of(rows, columns, split, 4)
    repeats = 4 if split is None else 1
    reads = SharedBlocks(layouts[::repeats], replicas, repeats, axis, is_mixed)
    numbered = np.arange(1.0, rows * columns + 1)
    array = np.zeros(reads.array_shape)
    device_indices = range(4 * replicas)
    for number in map(reads.block_of_device, device_indices):
        shard, part = divmod(number, reads.parts)
        index = [slice(None)] * array.ndim
        index[0] = slice(None) if is_mixed else slice(shard, shard + 1)
        index[1 + axis] = slice(part * reads.part, (part + 1) * reads.part)
        assert reads.block_at(tuple(index)) == number
        block = filled(reads.layout(number), numbered)
        assert block.shape == reads.block_shape
        array[tuple(index)] = block
    expected = np.stack([filled(layout, numbered) for layout in reads.shards])
    trimmed = np.take(array, range(reads.length), 1 + axis)
    np.testing.assert_array_equal(trimmed, expected)
    assert np.count_nonzero(array) == expected.size  # the rest is padding
    assert Counter(map(reads.block_of_device, device_indices)) == Counter(range(4 * replicas))
    counted = sum(reads.read_elements([device_index]) for device_index in device_indices)
    assert counted == reads.read_elements(device_indices) == expected.size
    for device_index in device_indices:
        block = reads.layout(reads.block_of_device(device_index))
        assert reads.read_elements([device_index]) == source_elements(block)


@pytest.mark.parametrize(
    ("rows", "columns", "parts", "axis"),
    [
        (8, 8, 4, 0),  # rows are farther apart than columns
        (7, 4, 6, 1),  # 7 rows by 6 leave some devices idle, and 4 columns more
        (2, 64, 8, 1),  # two rows cannot be cut into eight
        (15, 4, 8, 0),  # one row short of even is even enough
    ],
)
def test_the_axis_that_is_divided(rows: int, columns: int, parts: int, axis: int) -> None:
    (layout,) = shards_of(rows, columns, None, 1)
    assert slowest_axis(layout, parts) == axis
    assert slowest_axis(layout.transpose((1, 0)), parts) == 1 - axis


def test_an_axis_that_repeats_is_not_divided() -> None:
    (layout,) = shards_of(4, 4, None, 1)
    assert slowest_axis(layout.broadcast(0, 8), 4) == 1
    assert slowest_axis(zeros(()).layout, 4) is None
