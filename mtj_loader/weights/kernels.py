"""What is done to elements on the host: strided copies, dtype changes, the search for NaN.

Each works on a panel of about a megabyte, so that it stays in cache between the read and the copy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mtj_loader.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from mtj_loader.weights.copies import Copy

# A transpose gathers 512 rows at a time, whose lines fit the first-level cache: every line of the
# target gets a kilobyte of 2-byte elements at once. 256 rows took 20 % longer, 64 rows 50 %.
_TILE_ROWS = 512
_TILE_ELEMENTS = 1 << 16  # the tile, 128 KiB, stays in the second-level cache
# A power-of-two distance between rows would map all of them to the same cache sets; half a page
# line more than a multiple of 64 bytes spreads them (2 to 2.5 times faster than without).
_TILE_PADDING = 48

_BITS = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}


def run_copy(copy: Copy, source: np.ndarray, first: int, target: np.ndarray) -> None:
    """Executes a copy between flat arrays of one dtype.

    Args:
      copy: what goes where.
      source: elements of the record from number `first` on.
      first: see `source`.
      target: the shard's whole buffer.
    """
    bits = _BITS[source.itemsize]
    src = _strided(source.view(bits), copy.src - first, [(x.count, x.src) for x in copy.loops])
    dst = _strided(target.view(bits), copy.dst, [(x.count, x.dst) for x in copy.loops])
    copy_strided(dst, src)


def _strided(flat: np.ndarray, start: int, loops: list[tuple[int, int]]) -> np.ndarray:
    """A view with an axis for each (count, stride); numpy checks that it lies inside `flat`.

    The constructor takes a tenth of the time of `as_strided`, which counts for small copies.
    """
    size = flat.itemsize
    strides = [stride * size for _, stride in loops]
    return np.ndarray([n for n, _ in loops], flat.dtype, flat, start * size, strides)


def copy_strided(dst: np.ndarray, src: np.ndarray) -> None:
    """`dst[...] = src`, in padded tiles where the two sides run along different axes."""
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
    tile = np.empty((height, width + _TILE_PADDING), src.dtype)
    for c in range(0, columns, width):
        for r in range(0, rows, height):
            block = src[r : r + height, c : c + width]
            padded = tile[: block.shape[0], : block.shape[1]]
            np.copyto(padded, block)
            np.copyto(dst[r : r + height, c : c + width], padded)


Finish = Callable[[np.ndarray], np.ndarray]  # a panel as the file has it → as the device gets it


def finishing(source: np.dtype, target: np.dtype, divisor: int) -> Finish | None:
    """The element-wise work between file and device, None if there is none.

    Division is IEEE division by the shard count in float32; whatever is done, the result is
    rounded to `target` once, to nearest even.
    """
    if divisor == 1:
        return None if source == target else lambda chunk: cast(chunk, target)
    by = np.float32(divisor)

    def divided(chunk: np.ndarray) -> np.ndarray:
        with _silence():
            return cast(np.divide(cast(chunk, FLOAT32), by), target)

    return divided


def cast(chunk: np.ndarray, target: np.dtype) -> np.ndarray:
    """Another dtype, rounded once to nearest even."""
    if chunk.dtype == BFLOAT16 and target == FLOAT32:  # exact: the missing bits are zeros
        return (chunk.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    with _silence():
        return chunk.astype(FLOAT32).astype(target)  # exact, then rounded once


def _silence() -> np.errstate:
    """No warnings: `overflowed` looks for infinity, `count_nonfinite` for NaN.

    And what lies in a panel between the runs that were read may be anything.
    """
    return np.errstate(over="ignore", invalid="ignore")


_EXPONENT = {  # all of its bits are set in NaN and infinity alone
    FLOAT16: 0x7C00, BFLOAT16: 0x7F80, FLOAT32: 0x7F800000, FLOAT64: 0x7FF0000000000000,
}  # fmt: skip


def is_nonfinite(chunk: np.ndarray) -> np.ndarray:
    """Which elements are NaN or infinite."""
    mask = _BITS[chunk.itemsize].type(_EXPONENT[chunk.dtype])
    return (chunk.view(_BITS[chunk.itemsize]) & mask) == mask


def count_nonfinite(chunk: np.ndarray) -> int:
    """How many elements are NaN or infinite."""
    return int(np.count_nonzero(is_nonfinite(chunk)))


def overflowed(before: np.ndarray, after: np.ndarray) -> int:
    """How many finite elements a dtype change made infinite."""
    return count_nonfinite(after) - count_nonfinite(before)
