"""Copies: every byte of a shard is copied, for any division of the file into chunks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtj_loader.dtypes import BFLOAT16, FLOAT16, FLOAT32
from mtj_loader.formats.records import TensorRecord
from mtj_loader.parameters import axes
from mtj_loader.weights import kernels
from mtj_loader.weights.copies import Copy, Loop, clip, runs, shard_copies, shard_layouts
from mtj_loader.weights.kernels import copy_strided, count_nonfinite, execute_copy, make_conversion
from mtj_loader.weights.view import Layout, view_of
from tests.weights.test_view import materialize, pairs


def layout_of(*shape: int) -> Layout:
    return view_of(TensorRecord("t", "f", 0, "F32", shape)).layout


@given(pairs(), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_copies_in_chunks_of_any_size_equal_the_view(pair, chunk: int) -> None:
    """Reads only the needed runs of each record, in chunks; all other elements stay NaN."""
    view = pair.view
    found = shard_copies(view.layout)
    buffer = np.full(view.shape, np.nan, np.float32)
    for box in found.zeros:
        buffer[box] = 0
    for source, record in enumerate(view.records):
        mine = tuple(copy for copy in found.copies if copy.source == source)
        data = pair.data[record.name].astype(np.float32).reshape(-1)
        readable = np.full_like(data, np.nan)
        for start, stop in runs(mine):
            readable[start:stop] = data[start:stop]
        for start in range(0, data.size, chunk):
            for copy in mine:
                for part in clip(copy, start, start + chunk):
                    block = readable[start : start + chunk]
                    execute_copy(part, block, start, buffer.reshape(-1))
    np.testing.assert_array_equal(buffer, materialize(view, pair.data).astype(np.float32))


def test_a_row_shard_is_one_run() -> None:
    second = shard_layouts(layout_of(6, 4), axes("a b", {"a": 6, "b": 4}), "a", 3)[1]
    (copy,) = shard_copies(second).copies
    assert copy == Copy(0, 8, 0, (Loop(8, 1, 1),))
    assert copy.is_contiguous
    assert runs((copy,)).tolist() == [[8, 16]]


def test_a_column_shard_is_a_run_per_row() -> None:
    second = shard_layouts(layout_of(3, 4), axes("a b", {"a": 3, "b": 4}), "b", 2)[1]
    (copy,) = shard_copies(second).copies
    assert copy == Copy(0, 2, 0, (Loop(3, 4, 2), Loop(2, 1, 1)))
    assert runs((copy,)).tolist() == [[2, 4], [6, 8], [10, 12]]


def test_all_column_shards_together_are_one_run() -> None:
    parts = shard_layouts(layout_of(3, 4), axes("a b", {"a": 3, "b": 4}), "b", 2)
    copies = tuple(copy for part in parts for copy in shard_copies(part).copies)
    assert runs(copies).tolist() == [[0, 12]]


def test_replicated_shards_have_equal_layouts() -> None:
    first, second = shard_layouts(layout_of(5), axes("d", {"d": 5}), None, 2)
    assert first == second


def test_heads_are_split_by_head_though_their_axis_is_merged() -> None:
    groups = axes("d (h 3 k)", {"d": 2, "h": 4, "k": 5})
    shards = shard_layouts(layout_of(60, 2).transpose((1, 0)), groups, "h", 2)
    assert [s.shape for s in shards] == [(2, 2, 3, 5)] * 2
    (copy,) = shard_copies(shards[1]).copies
    assert copy == Copy(0, 60, 0, (Loop(30, 2, 1), Loop(2, 1, 30)))


@pytest.mark.parametrize("with_cv2", [False, True])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize("shape", [(1, 1), (129, 2049), (300, 5), (3, 70, 90), (2, 300, 517)])
@pytest.mark.parametrize("part", [np.s_[:], np.s_[..., ::-1, :], np.s_[..., ::2]], ids=str)
def test_tiled_transpose_equals_numpy(
    part: tuple, shape: tuple[int, ...], dtype: type, *, with_cv2: bool, monkeypatch
) -> None:
    monkeypatch.setattr(kernels, "_MIN_CV2_BYTES", 0)
    if not with_cv2:
        monkeypatch.setattr(kernels, "load_cv2", lambda: None)
    assert (kernels.load_cv2() is not None) == with_cv2
    random = np.random.default_rng(0)
    src = random.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)[part]
    out = np.zeros((*src.shape[:-2], src.shape[-1], src.shape[-2] + 3), dtype)
    copy_strided(np.swapaxes(out[..., 1:-2], -1, -2), src)
    np.testing.assert_array_equal(out[..., 1:-2], np.swapaxes(src, -1, -2))
    assert not out[..., 0].any()
    assert not out[..., -2:].any()


def test_bfloat16_widens_exactly() -> None:
    every = np.arange(65536, dtype=np.uint16).view(BFLOAT16)
    convert = make_conversion(BFLOAT16, FLOAT32, 1)
    assert convert is not None
    wide = convert(every)
    finite = np.isfinite(wide)
    assert finite.sum() == 65536 - 2 * 128
    np.testing.assert_array_equal(
        wide[finite].astype(BFLOAT16).view(np.uint16), every.view(np.uint16)[finite]
    )
    np.testing.assert_array_equal(wide.view(np.uint32) & 0xFFFF, 0)


@pytest.mark.parametrize("shards", [2, 3, 6, 7])
@pytest.mark.parametrize("source", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
def test_division_is_ieee_float32_rounded_once(shards: int, source: np.dtype) -> None:
    values = np.random.default_rng(shards).normal(size=4096).astype(source)
    # The float64 quotient of float32 operands, rounded to float32, is the IEEE float32 quotient:
    # 53 bits are more than twice 24 and two (Figueroa, 1995).
    exact = (values.astype(np.float64) / shards).astype(np.float32)
    for target in (FLOAT32, BFLOAT16, FLOAT16):
        convert = make_conversion(source, target, shards)
        assert convert is not None
        np.testing.assert_array_equal(convert(values), exact.astype(target))


def test_nothing_to_finish_is_none() -> None:
    assert make_conversion(BFLOAT16, BFLOAT16, 1) is None


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
def test_nonfinite_elements_are_counted(dtype: np.dtype) -> None:
    assert count_nonfinite(np.array([1, np.nan, -np.inf, 0, np.inf, -2], dtype)) == 3
