"""Schedules: every element of a shard is filled, and no source element is read twice."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtj_loader.formats.records import TensorRecord
from mtj_loader.loading import schedule
from mtj_loader.loading.schedule import Read, schedule_reads
from mtj_loader.parameters import Axis, axes
from mtj_loader.weights.copies import Copy, Loop, join_shards, runs, shard_copies, shard_layouts
from mtj_loader.weights.kernels import execute_copy
from mtj_loader.weights.view import Layout, view_of
from tests.weights.test_view import Pair, materialize, pairs

ITEM_BYTES = 4


def shards_of(rows: int, columns: int, split: str, shards: int) -> tuple[Layout, ...]:
    layout = view_of(TensorRecord("t", "f", 0, "F32", (rows, columns))).layout
    return shard_layouts(layout, axes("a b", {"a": rows, "b": columns}), split, shards)


def execute(reads: tuple[Read, ...], sources: list[np.ndarray], size: int) -> np.ndarray:
    """Executes reads like the loader; elements that are not read or not written are NaN."""
    buffer = np.full(size, np.nan, np.float32)
    for read in reads:
        chunk = np.full(read.span, np.nan, np.float32)
        for start, stop in read.runs:
            chunk[start - read.start : stop - read.start] = sources[read.source][start:stop]
        if read.is_direct:
            first = read.copies[0].dst
            buffer[first : first + read.size] = chunk
            continue
        for copy in read.copies:
            execute_copy(copy, chunk, read.start, buffer)
    return buffer


def read_once(reads: tuple[Read, ...], shards: tuple[Layout, ...]) -> bool:
    """Whether the runs of all reads are what the shards need, each element once."""
    for source in {copy.source for layout in shards for copy in shard_copies(layout).copies}:
        mine = sorted(run for read in reads if read.source == source for run in read.runs)
        copies = [copy for layout in shards for copy in shard_copies(layout).copies]
        needed = runs(tuple(copy for copy in copies if copy.source == source))
        if any(a[1] > b[0] for a, b in pairwise(mine)):
            return False
        if sum(b - a for a, b in mine) != (needed[:, 1] - needed[:, 0]).sum():
            return False
    return True


@st.composite
def sharded(draw: st.DrawFn) -> tuple[Pair, tuple[Layout, ...]]:
    """A view of one or several records, and the layouts of some of its shards."""
    pair = draw(pairs())
    shape = pair.view.shape
    axis = draw(st.integers(0, len(shape) - 1))
    divisors = [n for n in range(1, shape[axis] + 1) if shape[axis] % n == 0]
    groups = tuple((Axis(f"axis{i}", size),) for i, size in enumerate(shape))
    count = draw(st.sampled_from(divisors or [1]))
    layouts = shard_layouts(pair.view.layout, groups, f"axis{axis}", count)
    held = draw(st.lists(st.sampled_from(layouts), min_size=1, unique=True))
    return pair, tuple(held)


@given(sharded(), st.integers(0, 3), st.integers(1, 64), st.booleans())
def test_some_shards_are_filled_and_nothing_is_read_twice(
    found: tuple[Pair, tuple[Layout, ...]], gap: int, chunk: int, may_read_directly: bool
) -> None:
    pair, shards = found
    spacing = shards[0].size + gap
    schedule_reads.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "CHUNK_BYTES", chunk * ITEM_BYTES)
        patch.setattr(schedule, "_TRANSPOSED_CHUNK_BYTES", 2 * chunk * ITEM_BYTES)
        patch.setattr(schedule, "DIRECT_READ_BYTES", chunk * ITEM_BYTES)
        patch.setattr(schedule, "_MIN_DIRECT_READ_BYTES", 2 * ITEM_BYTES)
        reads = schedule_reads(shards, spacing, ITEM_BYTES, may_read_directly)
    schedule_reads.cache_clear()
    sources = [pair.data[r.name].astype(np.float32).reshape(-1) for r in pair.view.records]
    buffer = execute(reads, sources, spacing * len(shards))
    assert read_once(reads, shards)
    for i, layout in enumerate(shards):
        shard = buffer[i * spacing :][: layout.size].reshape(layout.shape)
        for box in shard_copies(layout).zeros:
            shard[box] = 0
        expected = materialize(pair.view.with_layout(layout), pair.data)
        np.testing.assert_array_equal(shard, expected.astype(np.float32))


def test_adjacent_row_shards_are_one_run() -> None:
    assert join_shards(shards_of(8, 4, "a", 4), 8) == (Copy(0, 0, 0, (Loop(32, 1, 1),)),)


def test_row_shards_with_gaps_between_their_buffers_are_one_copy() -> None:
    (copy,) = join_shards(shards_of(8, 4, "a", 4), 10)
    assert copy == Copy(0, 0, 0, (Loop(4, 8, 10), Loop(8, 1, 1)))


def test_column_shards_are_one_copy() -> None:
    (copy,) = join_shards(shards_of(3, 4, "b", 2), 6)
    assert copy == Copy(0, 0, 0, (Loop(3, 4, 2), Loop(2, 2, 6), Loop(2, 1, 1)))


def test_shards_with_a_gap_are_not_merged() -> None:
    first, second, _, fourth = shards_of(8, 4, "a", 4)
    assert [c.src for c in join_shards((first, second, fourth), 9)] == [0, 24]


def test_a_host_with_the_second_half_reads_the_second_half() -> None:
    (read,) = schedule_reads(shards_of(8, 4, "a", 4)[2:], 8, ITEM_BYTES, may_read_directly=True)
    assert read == Read(0, ((16, 32),), (Copy(0, 16, 0, (Loop(16, 1, 1),)),), is_direct=True)


def test_elements_that_change_go_through_a_chunk() -> None:
    (read,) = schedule_reads(shards_of(8, 4, "a", 4), 8, ITEM_BYTES, may_read_directly=False)
    assert not read.is_direct


def test_a_transpose_uses_larger_chunks() -> None:
    rows, columns = 4096, 1024  # 16 MiB
    layout = view_of(TensorRecord("t", "f", 0, "F32", (rows, columns))).layout
    direct = schedule_reads((layout,), layout.size, ITEM_BYTES, may_read_directly=False)
    transposed = schedule_reads(
        (layout.transpose((1, 0)),), layout.size, ITEM_BYTES, may_read_directly=True
    )
    assert [len(direct), len(transposed)] == [16, 4]


def test_shards_that_share_elements_read_them_once() -> None:
    whole = view_of(TensorRecord("t", "f", 0, "F32", (10, 4))).layout
    shards = tuple(whole.slice((first, 0), (first + 6, 4)) for first in (0, 3, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "_MIN_DIRECT_READ_BYTES", ITEM_BYTES)
        reads = schedule_reads(shards, 24, ITEM_BYTES, may_read_directly=True)
    assert read_once(reads, shards)
