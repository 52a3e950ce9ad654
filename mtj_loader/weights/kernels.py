"""Work on elements on the host: strided copies, dtype conversion, detection of NaN and infinity.

Each works on a chunk of about a megabyte, which stays in cache between the read and the copy.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mtj_loader.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from mtj_loader.weights.copies import Copy

# A transpose gathers 512 rows at a time. Their cache lines fit the L1 cache, and every row of the
# target gets a kilobyte of 2-byte elements at once. 256 rows took 20 % longer, 64 rows 50 %.
_TILE_ROWS = 512
_TILE_ELEMENTS = 1 << 16  # the tile, 128 KiB of 2-byte elements, stays in the L2 cache
# With a power-of-two distance between rows, all rows map to the same cache sets. Padding each row
# spreads them (2 to 2.5 times faster).
_TILE_PADDING = 48

_MIN_CV2_BYTES = 1 << 16
_CV2_DTYPES = {2: np.dtype(np.uint16), 4: np.dtype(np.int32), 8: np.dtype(np.float64)}

_BITS = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}


def execute_copy(copy: Copy, source: np.ndarray, first: int, target: np.ndarray) -> None:
    """Executes a copy between flat arrays of one dtype.

    Args:
      copy: the copy.
      source: the record's elements, starting with element `first`.
      first: see `source`.
      target: the shard's whole buffer.
    """
    bits = _BITS[source.itemsize]
    src = _strided(source.view(bits), copy.src - first, [(x.count, x.src) for x in copy.loops])
    dst = _strided(target.view(bits), copy.dst, [(x.count, x.dst) for x in copy.loops])
    copy_strided(dst, src)


def _strided(flat: np.ndarray, start: int, loops: list[tuple[int, int]]) -> np.ndarray:
    """A view with one axis per (count, stride); numpy checks that it lies inside `flat`.

    The constructor takes a tenth of the time of `as_strided`, which matters for small copies.
    """
    size = flat.itemsize
    strides = [stride * size for _, stride in loops]
    return np.ndarray([n for n, _ in loops], flat.dtype, flat, start * size, strides)


def copy_strided(dst: np.ndarray, src: np.ndarray) -> None:
    """`dst[...] = src`, in padded tiles if the two sides are contiguous along different axes.

    Elements have 2, 4 or 8 bytes. The `fast` extra makes transposes about twice as fast.
    """
    if dst.ndim < 2 or dst.strides[-1] <= dst.itemsize or src.strides[-1] == 0:
        np.copyto(dst, src)
        return
    row = min(range(dst.ndim), key=lambda axis: dst.strides[axis])
    dst, src = np.moveaxis(dst, row, -2), np.moveaxis(src, row, -2)
    for outer in np.ndindex(dst.shape[:-2]):
        _transpose(dst[outer], src[outer])


def _transpose(dst: np.ndarray, src: np.ndarray) -> None:
    """Copies [rows, columns] where `src` is contiguous along columns and `dst` along rows."""
    rows, columns = src.shape
    height = min(rows, _TILE_ROWS)
    width = min(columns, _TILE_ELEMENTS // height)
    copy = _copy_block if src.nbytes < _MIN_CV2_BYTES or load_cv2() is None else _copy_block_by_cv2
    scratch = np.empty((height + _TILE_PADDING) * (width + _TILE_PADDING), src.dtype)
    for c in range(0, columns, width):
        for r in range(0, rows, height):
            block = np.s_[r : r + height, c : c + width]
            copy(dst[block], src[block], scratch)


def _copy_block(dst: np.ndarray, src: np.ndarray, scratch: np.ndarray) -> None:
    """Copies the rows to a tile, and transposes from there."""
    tile = _tile(scratch, *src.shape)
    np.copyto(tile, src)
    np.copyto(dst, tile)


def _copy_block_by_cv2(dst: np.ndarray, src: np.ndarray, scratch: np.ndarray) -> None:
    """Transposes into a tile, and copies its rows."""
    dtype = _CV2_DTYPES[src.itemsize]
    tile = _tile(scratch, *src.T.shape).view(dtype)
    load_cv2().transpose(src.view(dtype), dst=tile)
    np.copyto(dst.T, tile.view(src.dtype))


def _tile(scratch: np.ndarray, rows: int, columns: int) -> np.ndarray:
    width = columns + _TILE_PADDING
    return scratch[: rows * width].reshape(rows, width)[:, :columns]


@functools.cache  # the import takes 40 ms, so it waits for the first large transpose
def load_cv2() -> Any:  # noqa: ANN401 - a module
    """OpenCV, whose transpose is about twice as fast as ours; None if it is not installed."""
    try:
        return importlib.import_module("cv2")
    except ImportError:
        return None


Conversion = Callable[[np.ndarray], np.ndarray]  # a chunk as in the file → as on the device


def make_conversion(source: np.dtype, target: np.dtype, divisor: int) -> Conversion | None:
    """The element-wise work between file and device; None if there is none.

    Elements are divided by `divisor` in float32 (IEEE division). The result is rounded to `target`
    once, to nearest even.
    """
    if divisor == 1:
        return None if source == target else lambda chunk: cast(chunk, target)
    by = np.float32(divisor)

    def divide(chunk: np.ndarray) -> np.ndarray:
        with _ignore_float_errors():
            return cast(np.divide(cast(chunk, FLOAT32), by), target)

    return divide


def cast(chunk: np.ndarray, target: np.dtype) -> np.ndarray:
    """Converts to another dtype, rounding once, to nearest even."""
    if chunk.dtype == BFLOAT16 and target == FLOAT32:  # exact: the missing bits are zeros
        return (chunk.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    with _ignore_float_errors():
        return chunk.astype(FLOAT32).astype(target)  # exact, then rounded once


def _ignore_float_errors() -> np.errstate:
    """Suppresses numpy's warnings about infinity and NaN.

    `count_overflows` and `count_nonfinite` find those in the elements that were read. The other
    elements of a chunk are uninitialized.
    """
    return np.errstate(over="ignore", invalid="ignore")


_EXPONENT = {  # all of these bits are set only in NaN and infinity
    FLOAT16: 0x7C00, BFLOAT16: 0x7F80, FLOAT32: 0x7F800000, FLOAT64: 0x7FF0000000000000,
}  # fmt: skip


def is_nonfinite(chunk: np.ndarray) -> np.ndarray:
    """A mask of the elements that are NaN or infinite."""
    mask = _BITS[chunk.itemsize].type(_EXPONENT[chunk.dtype])
    return (chunk.view(_BITS[chunk.itemsize]) & mask) == mask


def count_nonfinite(chunk: np.ndarray) -> int:
    """The number of elements that are NaN or infinite."""
    return int(np.count_nonzero(is_nonfinite(chunk)))


def count_overflows(before: np.ndarray, after: np.ndarray) -> int:
    """The number of finite elements that a dtype conversion made infinite."""
    return count_nonfinite(after) - count_nonfinite(before)
