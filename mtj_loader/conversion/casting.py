"""A dtype change, element by element: rounded once, to nearest even, and its losses counted."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from mtj_loader.dtypes import FLOAT32, FLOAT64, WEIGHT_DTYPES
from mtj_loader.weights.kernels import count_nonfinite, is_nonfinite

SOURCES: dict[str, np.dtype] = WEIGHT_DTYPES | {"F64": FLOAT64}  # what can be converted
SPELLINGS = {dtype: name for name, dtype in SOURCES.items()}


@dataclass(frozen=True)
class Losses:
    """What a dtype change did to some elements.

    Attributes:
      overflow: finite ones that are too large for the new dtype.
      underflow: nonzero ones that became zero.
      nonfinite: ones that were NaN or infinite before, and are so still.
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
    """Changes the dtype of an array of one of the `SOURCES`.

    Args:
      chunk: the elements; given back as it is if it has the dtype already.
      target: float16, bfloat16 or float32.
      clamp: make the largest number of the new dtype of what overflows, instead of infinity.
    """
    nonfinite = count_nonfinite(chunk)
    if chunk.dtype == target:
        return chunk, Losses(nonfinite=nonfinite)
    after = _rounded(chunk, target)
    overflow = count_nonfinite(after) - nonfinite
    underflow = _count_nonzero(chunk) - _count_nonzero(after)
    if overflow and clamp:
        lost = is_nonfinite(after) & ~is_nonfinite(chunk)
        after[lost] = np.copysign(ml_dtypes.finfo(target).max, after[lost])
    return after, Losses(overflow, underflow, nonfinite)


def _rounded(chunk: np.ndarray, target: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # all are counted
        if chunk.dtype == FLOAT64 and target != FLOAT32:
            chunk = _rounded_to_odd(chunk)
        return chunk.astype(target)


def _rounded_to_odd(chunk: np.ndarray) -> np.ndarray:
    """float64 → float32, inexact results with the last bit set, so that rounding again is exact.

    Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using
    rounding to odd", 2008: it takes two bits more than the final format has.
    """
    near = chunk.astype(FLOAT32)
    wide, bits = near.astype(FLOAT64), near.view(np.uint32)
    inexact = wide != chunk
    bits -= np.abs(wide) > np.abs(chunk)  # one step toward zero
    bits |= inexact
    return near


def _count_nonzero(chunk: np.ndarray) -> int:
    return int(np.count_nonzero(chunk.view(f"u{chunk.itemsize}") << 1))  # without the sign
