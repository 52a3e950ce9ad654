"""What is done to elements on the host: strided copies, dtype changes, the search for NaN.

Each works on a panel of about a megabyte, so that it stays in cache between the read and the copy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mtj_loader.dtypes import BFLOAT16, FLOAT16, FLOAT32
from mtj_loader.loading.copies import Copy

_TILE_ROWS = 128  # rows a transpose gathers at a time: 256 bytes of each line it writes
_TILE_COLUMNS = 2048  # with it 512 KiB of 2-byte elements, which the second-level cache holds
# A power-of-two distance between rows would map all of them to the same cache sets; half a page
# line more than a multiple of 64 bytes spreads them (2 to 2.5 times faster than without).
_TILE_PADDING = 48

_BITS = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


def run_copy(copy: Copy, source: np.ndarray, first: int, target: np.ndarray) -> None:
    """Executes a copy between flat arrays of one dtype.

    Args:
      copy: what goes where.
      source: elements of the record from number `first` on.
      first: see `source`.
      target: the shard's whole buffer.
    """
    shape = tuple(loop.count for loop in copy.loops)
    size = source.itemsize
    src = np.lib.stride_tricks.as_strided(
        source[copy.src - first :], shape, [loop.src * size for loop in copy.loops]
    )
    dst = np.lib.stride_tricks.as_strided(
        target[copy.dst :], shape, [loop.dst * size for loop in copy.loops], writeable=True
    )
    bits = _BITS[size]
    copy_strided(dst.view(bits), src.view(bits))


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
    tile = np.empty((_TILE_ROWS, _TILE_COLUMNS + _TILE_PADDING), src.dtype)
    rows, columns = src.shape
    for r in range(0, rows, _TILE_ROWS):
        for c in range(0, columns, _TILE_COLUMNS):
            block = src[r : r + _TILE_ROWS, c : c + _TILE_COLUMNS]
            padded = tile[: block.shape[0], : block.shape[1]]
            np.copyto(padded, block)
            np.copyto(dst[r : r + _TILE_ROWS, c : c + _TILE_COLUMNS], padded)


Finish = Callable[[np.ndarray], np.ndarray]  # a panel as the file has it → as the device gets it


def finishing(source: np.dtype, target: np.dtype, divisor: int) -> Finish | None:
    """The element-wise work between file and device, None if there is none.

    Division is IEEE division by the shard count in float32; whatever is done, the result is
    rounded to `target` once, to nearest even.
    """
    if divisor == 1:
        return None if source == target else lambda panel: cast(panel, target)
    by = np.float32(divisor)
    return lambda panel: cast(np.divide(cast(panel, FLOAT32), by), target)


def cast(panel: np.ndarray, target: np.dtype) -> np.ndarray:
    """Another dtype, rounded once to nearest even."""
    if panel.dtype == BFLOAT16 and target == FLOAT32:  # exact: the missing bits are zeros
        return (panel.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # `overflowed` looks for it
        return panel.astype(FLOAT32).astype(target)  # exact, then rounded once


_EXPONENT = {FLOAT32: 0x7F800000, BFLOAT16: 0x7F80, FLOAT16: 0x7C00}  # all ones: NaN or infinity


def count_nonfinite(panel: np.ndarray) -> int:
    """How many elements are NaN or infinite."""
    mask = _BITS[panel.itemsize].type(_EXPONENT[panel.dtype])
    return int(np.count_nonzero((panel.view(_BITS[panel.itemsize]) & mask) == mask))


def overflowed(before: np.ndarray, after: np.ndarray) -> int:
    """How many finite elements a dtype change made infinite."""
    return count_nonfinite(after) - count_nonfinite(before)
