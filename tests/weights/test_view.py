"""Views against numpy: the same elements after any chain of transforms, in any box."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtj_loader.formats.records import TensorRecord
from mtj_loader.weights.view import ZEROS, Layout, Piece, View, concat, row_major, stack, view_of


def record(shape: tuple[int, ...], name: str = "t") -> TensorRecord:
    return TensorRecord(name, "f", 0, "F32", shape)


def materialize(view: View, data: dict[str, np.ndarray]) -> np.ndarray:
    """Every element of the view, piece by piece; NaN where there is no piece."""
    out = np.full(view.shape, np.nan)
    for p in view.layout.pieces:
        box = tuple(slice(a, b) for a, b in zip(p.start, p.stop, strict=True))
        if p.source == ZEROS:
            out[box] = 0
            continue
        flat = data[view.records[p.source].name].reshape(-1)[p.offset :]
        strides = [s * flat.itemsize for s in p.strides]
        out[box] = np.lib.stride_tricks.as_strided(flat, p.shape, strides)
    return out


@dataclass
class Pair:
    """A view, and the numpy array that it must equal."""

    view: View
    array: np.ndarray
    data: dict[str, np.ndarray] = field(default_factory=dict)


def fresh(shape: tuple[int, ...], tag: int) -> Pair:
    array = 1.0 + np.arange(math.prod(shape)).reshape(shape) + 1000 * tag
    return Pair(view_of(record(shape, f"t{tag}")), array, {f"t{tag}": array})


def divisors(n: int) -> list[int]:
    return [m for m in range(1, n + 1) if n % m == 0]


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    pair = fresh(shape, 0)
    for _ in range(draw(st.integers(0, 5))):
        pair = draw(st.sampled_from(STEPS))(draw, pair)
    return pair


def transposed(draw: st.DrawFn, p: Pair) -> Pair:
    axes = draw(st.permutations(range(p.array.ndim)))
    return Pair(p.view.transpose(axes), p.array.transpose(axes), p.data)


def sliced(draw: st.DrawFn, p: Pair) -> Pair:
    start = [draw(st.integers(0, n - 1)) for n in p.array.shape]
    stop = [draw(st.integers(a + 1, n)) for a, n in zip(start, p.array.shape, strict=True)]
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    return Pair(p.view.slice(start, stop), p.array[box], p.data)


def padded(draw: st.DrawFn, p: Pair) -> Pair:
    axis = draw(st.integers(0, p.array.ndim - 1))
    more = draw(st.integers(0, 3))
    width = [(0, more if i == axis else 0) for i in range(p.array.ndim)]
    view = p.view.pad(axis, p.array.shape[axis] + more)
    return Pair(view, np.pad(p.array, width), p.data)


def split(draw: st.DrawFn, p: Pair) -> Pair:
    axis = draw(st.integers(0, p.array.ndim - 1))
    n = p.array.shape[axis]
    outer = draw(st.sampled_from(divisors(n)))
    middle = draw(st.sampled_from(divisors(n // outer)))
    sizes = (outer, middle, n // outer // middle)
    shape = (*p.array.shape[:axis], *sizes, *p.array.shape[axis + 1 :])
    return Pair(p.view.split_axis(axis, sizes), p.array.reshape(shape), p.data)


def broadcasted(draw: st.DrawFn, p: Pair) -> Pair:
    axis = draw(st.integers(0, p.array.ndim))
    size = draw(st.integers(1, 3))
    array = np.repeat(np.expand_dims(p.array, axis), size, axis)
    return Pair(p.view.broadcast(axis, size), array, p.data)


def joined(draw: st.DrawFn, p: Pair) -> Pair:
    axis = draw(st.integers(0, p.array.ndim - 1))
    shape = list(p.array.shape)
    shape[axis] = draw(st.integers(1, 4))
    other = fresh(tuple(shape), len(p.data))
    order = [p, other] if draw(st.booleans()) else [other, p]
    view = concat([q.view for q in order], axis)
    return Pair(view, np.concatenate([q.array for q in order], axis), p.data | other.data)


def stacked(draw: st.DrawFn, p: Pair) -> Pair:
    axis = draw(st.integers(0, p.array.ndim))
    other = fresh(p.array.shape, len(p.data))
    order = [p, other] if draw(st.booleans()) else [other, p]
    view = stack([q.view for q in order], axis)
    return Pair(view, np.stack([q.array for q in order], axis), p.data | other.data)


STEPS = [transposed, sliced, padded, split, broadcasted, joined, stacked]


@given(st.data(), pairs())
@settings(max_examples=300, deadline=None)
def test_any_chain_and_any_box_equals_numpy(data: st.DataObject, pair: Pair) -> None:
    pair.view.layout.check_tiling()
    np.testing.assert_array_equal(materialize(pair.view, pair.data), pair.array)
    box = sliced(data.draw, pair)
    box.view.layout.check_tiling()
    np.testing.assert_array_equal(materialize(box.view, box.data), box.array)


def test_a_row_shard_is_one_piece_and_a_column_shard_strides_over_rows() -> None:
    whole = view_of(record((6, 4))).layout
    assert whole.slice((2, 0), (4, 4)) == Layout((2, 4), (Piece((0, 0), (2, 4), 0, 8, (4, 1)),))
    assert whole.slice((0, 2), (6, 4)) == Layout((6, 2), (Piece((0, 0), (6, 2), 0, 2, (4, 1)),))


def test_padding_that_ends_inside_a_shard_is_two_pieces() -> None:
    layout = view_of(record((5,))).layout.pad(0, 6).split_axis(0, (2, 3)).slice((1, 0), (2, 3))
    assert layout.pieces == (
        Piece((0, 0), (1, 2), 0, 3, (3, 1)),
        Piece((0, 2), (1, 1), ZEROS, 0, (0, 0)),
    )


def test_a_hole_is_an_error() -> None:
    half = Layout((4,), (Piece((0,), (2,), 0, 0, (1,)),))
    with pytest.raises(ValueError, match="cover 2 elements of a view of 4"):
        half.check_tiling()


def test_an_overlap_is_an_error_even_if_the_volume_fits() -> None:
    twice = Layout((4,), (Piece((0,), (2,), 0, 0, (1,)), Piece((1,), (2,), 0, 0, (1,))))
    with pytest.raises(ValueError, match="piece 1 overlaps an earlier piece"):
        twice.check_tiling()


def test_joining_shapes_that_differ_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot join"):
        concat([view_of(record((2, 3))), view_of(record((2, 4)))], 0)


def test_splitting_into_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot split an axis of 6"):
        view_of(record((6,))).split_axis(0, (4, 2))


def test_strides_of_a_record_are_honored() -> None:
    turned = TensorRecord("t", "f", 0, "F32", (2, 3), strides=(1, 2))
    data = {"t": np.arange(6.0)}
    np.testing.assert_array_equal(
        materialize(view_of(turned), data), np.arange(6.0).reshape(3, 2).T
    )


def test_row_major_strides() -> None:
    assert row_major((2, 3, 4)) == (12, 4, 1)


def test_equal_layers_share_their_layouts() -> None:
    first, second = (TensorRecord(f"h.{i}.w", "f", 100 * i, "F32", (6, 4)) for i in range(2))

    def layouts(record: TensorRecord) -> list[Layout]:
        view = view_of(record)
        changed = [view, view.transpose((1, 0)), view.slice((1, 0), (6, 4)), view.pad(0, 8)]
        changed += [view.split_axis(0, (2, 3)), view.broadcast(0, 2), concat([view, view], 1)]
        return [each.layout for each in changed]

    for one, other in zip(layouts(first), layouts(second), strict=True):
        assert one is other
