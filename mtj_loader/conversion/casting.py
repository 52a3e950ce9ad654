"""Changing the dtype of elements: rounding once, to nearest even, and counting losses."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from mtj_loader.dtypes import FLOAT32, FLOAT64, WEIGHT_DTYPES
from mtj_loader.weights.kernels import count_nonfinite, is_nonfinite

# What can be converted, by the names that safetensors uses.
SOURCE_DTYPES: dict[str, np.dtype] = WEIGHT_DTYPES | {"F64": FLOAT64}
SAFETENSORS_NAMES = {dtype: name for name, dtype in SOURCE_DTYPES.items()}


@dataclass(frozen=True)
class Losses:
    """Numbers of elements that a dtype change lost, or that were NaN or infinite before.

    Attributes:
      overflow: finite elements that are too large for the new dtype.
      underflow: nonzero elements that became zero.
      nonfinite: elements that were NaN or infinite before the change; they stay so.
    """

    overflow: int = 0
    underflow: int = 0
    nonfinite: int = 0

    def __add__(self, other: Losses) -> Losses:
        return Losses(
            self.overflow + other.overflow,
            self.underflow + other.underflow,
            self.nonfinite + other.nonfinite,
        )


def cast(chunk: np.ndarray, target: np.dtype, *, clamp: bool) -> tuple[np.ndarray, Losses]:
    """Changes the dtype of an array that has one of the `SOURCE_DTYPES`.

    Args:
      chunk: the elements; returned unchanged if it already has the dtype.
      target: float16, bfloat16 or float32.
      clamp: replace what overflows with the largest number of the new dtype, not infinity.
    """
    nonfinite = count_nonfinite(chunk)
    if chunk.dtype == target:
        return chunk, Losses(nonfinite=nonfinite)
    after = _round(chunk, target)
    overflow = count_nonfinite(after) - nonfinite
    underflow = _count_nonzero(chunk) - _count_nonzero(after)
    if overflow and clamp:
        lost = is_nonfinite(after) & ~is_nonfinite(chunk)
        after[lost] = np.copysign(ml_dtypes.finfo(target).max, after[lost])
    return after, Losses(overflow, underflow, nonfinite)


def _round(chunk: np.ndarray, target: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # they are counted
        if chunk.dtype == FLOAT64 and target != FLOAT32:
            chunk = _round_to_odd(chunk)
        return chunk.astype(target)


def _round_to_odd(chunk: np.ndarray) -> np.ndarray:
    """float64 → float32 with the last bit set if inexact, so that rounding again is correct.

    Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using
    rounding to odd", 2008: the intermediate format needs two more bits than the final one.
    """
    near = chunk.astype(FLOAT32)
    wide, bits = near.astype(FLOAT64), near.view(np.uint32)
    inexact = wide != chunk
    bits -= np.abs(wide) > np.abs(chunk)  # one step toward zero
    bits |= inexact
    return near


def _count_nonzero(chunk: np.ndarray) -> int:
    return int(np.count_nonzero(chunk.view(f"u{chunk.itemsize}") << 1))  # ignores the sign bit
