"""Dtype changes of arrays: every 16-bit value, and rounding compared with exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtj_loader.conversion.casting import Losses, cast

F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
EVERY = np.arange(65536, dtype=np.uint16)


def bits(array):
    return array.view(f"u{array.itemsize}")


def wide(array):
    """As float64, which represents all of them; hides numpy's warning about NaN."""
    with np.errstate(invalid="ignore"):
        return array.astype(F64)


def is_number(array):
    return ~np.isnan(wide(array))


def nearest(value: float, dtype: np.dtype) -> int:
    """The bits of the nearest 16-bit number, by exact arithmetic; ties go to even bits."""
    table = wide(EVERY[:32768].view(dtype))
    largest = int(np.flatnonzero(np.isfinite(table))[-1])
    exact = abs(Fraction(value))
    low = min(int(np.searchsorted(table[: largest + 1], abs(value), side="right")) - 1, largest)
    values = [Fraction(table[low])]
    if low < largest:
        values.append(Fraction(table[low + 1]))
    else:  # the next number would be infinity
        values.append(2 * Fraction(table[largest]) - Fraction(table[largest - 1]))
    down, up = exact - values[0], values[1] - exact
    chosen = low if down < up or (down == up and low % 2 == 0) else low + 1
    return chosen | (0x8000 if np.signbit(value) else 0)


def test_every_bfloat16_to_float16():
    """Of 65,278 finite nonzero values, 28,672 overflow and 26,112 become zero."""
    every = EVERY.view(BF16)
    assert np.count_nonzero(np.isfinite(wide(every)) & (wide(every) != 0)) == 65_278
    found, losses = cast(every, F16, clamp=False)
    assert losses == Losses(overflow=28_672, underflow=26_112, nonfinite=256)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = every.astype(F32).astype(F16)  # exact, then rounded by numpy
    known = is_number(every)
    np.testing.assert_array_equal(bits(found)[known], bits(expected)[known])
    assert np.isnan(found[~known]).all()


def test_every_bfloat16_to_float16_clamped():
    every = EVERY.view(BF16)
    plain, losses = cast(every, F16, clamp=False)
    clamped, same = cast(every, F16, clamp=True)
    assert losses == same
    changed = bits(plain) != bits(clamped)
    assert np.count_nonzero(changed) == 28_672
    assert (np.abs(clamped[changed]) == 65504).all()
    assert (np.signbit(clamped[changed]) == np.signbit(every[changed].astype(F32))).all()
    assert np.count_nonzero(np.isinf(clamped)) == 2  # the infinities of the source are kept


@pytest.mark.parametrize(("source", "target"), [(F16, F32), (BF16, F32)], ids=str)
def test_wider_is_exact(source, target):
    every = EVERY.view(source)
    found, losses = cast(every, target, clamp=False)
    assert (losses.overflow, losses.underflow) == (0, 0)
    known = is_number(every)
    assert (found[known].astype(F64) == every[known].astype(F64)).all()
    back, _ = cast(found, source, clamp=False)
    np.testing.assert_array_equal(bits(back)[known], bits(every)[known])


def test_every_float16_to_bfloat16():
    every = EVERY.view(F16)
    found, losses = cast(every, BF16, clamp=False)
    assert losses == Losses(nonfinite=2 * 1024)
    finite = np.isfinite(every)
    expected = [nearest(float(value), BF16) for value in every[finite][::7]]
    assert bits(found)[finite][::7].tolist() == expected


def midpoints(dtype):
    """float32 numbers at, just below and just above the midpoint of 16-bit neighbors."""
    table = wide(EVERY[:32768].view(dtype))
    table = table[np.isfinite(table)][::37]
    middles = ((table[:-1] + table[1:]) / 2).astype(F32)
    around = [np.nextafter(middles, F32.type(s)) for s in (0, np.inf)]
    return np.concatenate([middles, *around])


@pytest.mark.parametrize("target", [F16, BF16], ids=str)
def test_float32_near_the_midpoint(target):
    source = midpoints(target)
    found, _ = cast(source, target, clamp=False)
    assert bits(found).tolist() == [nearest(float(value), target) for value in source]


@pytest.mark.parametrize("target", [F16, BF16], ids=str)
@settings(max_examples=200)
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_any_float32(target, value):
    found, _ = cast(np.array([value], F32), target, clamp=False)
    assert bits(found)[0] == nearest(value, target)


@pytest.mark.parametrize("target", [F16, BF16], ids=str)
@settings(max_examples=300)
@given(
    value=st.floats(allow_nan=False, allow_infinity=False)
    | st.floats(-1e5, 1e5)
    | st.builds(lambda middle, shift: middle * (1 + shift), st.sampled_from([1.00390625, 2049.0]),
                st.sampled_from([2.0**-k for k in range(30, 52)]))
)  # fmt: skip
def test_any_float64_is_rounded_once(target, value):
    """Rounding through float32 would round some twice, to the wrong side of a midpoint."""
    found, _ = cast(np.array([value, -value]), target, clamp=False)
    assert bits(found).tolist() == [nearest(value, target), nearest(-value, target)]


def test_float64_that_rounds_wrong_if_rounded_twice():
    value = 1 + 2.0**-8 + 2.0**-40  # just above the midpoint of two bfloat16
    assert np.array(value).astype(F32).astype(BF16) == 1
    found, _ = cast(np.array([value]), BF16, clamp=False)
    assert found[0] == 1 + 2.0**-7


@pytest.mark.parametrize("target", [F16, BF16, F32], ids=str)
def test_float64_losses(target):
    source = np.array([1e300, -1e300, 1e-300, -1e-300, 0.0, -0.0, np.nan, np.inf, -np.inf, 1.0])
    found, losses = cast(source, target, clamp=False)
    assert losses == Losses(overflow=2, underflow=2, nonfinite=3)
    assert np.signbit(wide(found)).tolist() == np.signbit(source).tolist()
    clamped, _ = cast(source, target, clamp=True)
    largest = float(ml_dtypes.finfo(target).max)
    assert wide(clamped)[:2].tolist() == [largest, -largest]
    assert np.isinf(wide(clamped)).sum() == 2


def test_float32_overflows_bfloat16_too():
    source = np.array([3.4e38, -3.4e38, 3.3e38], F32)
    found, losses = cast(source, BF16, clamp=True)
    assert losses == Losses(overflow=2)
    assert bits(found).tolist() == [0x7F7F, 0xFF7F, nearest(float(source[2]), BF16)]


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_same_dtype_is_the_same_array(dtype):
    source = np.array([1, np.nan, -np.inf, 0], dtype)
    found, losses = cast(source, dtype, clamp=True)
    assert found is source
    assert losses == Losses(nonfinite=2)


def test_losses_add_up():
    assert Losses(1, 2, 3) + Losses(10, 20, 30) == Losses(11, 22, 33)
