"""The dtypes of checkpoints and parameters: names, sizes and numpy types."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from mtj_loader.errors import UsageError

# Bits per element of every dtype that safetensors 0.8 defines. All are valid in a header.
BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip

# The dtypes of weights. Tensors with other dtypes can be listed but not loaded.
WEIGHT_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

FLOAT32 = WEIGHT_DTYPES["F32"]
BFLOAT16 = WEIGHT_DTYPES["BF16"]
FLOAT16 = WEIGHT_DTYPES["F16"]
FLOAT64 = np.dtype(np.float64)  # in checkpoints to convert; never in parameters

DTypeName = Literal["auto", "bfloat16", "float32", "float16"]
_PARAMETER_DTYPES = {"bfloat16": BFLOAT16, "float32": FLOAT32, "float16": FLOAT16}


def parameter_dtype(name: str) -> np.dtype:
    """The dtype of parameters for `dtype=name`; "auto" is bfloat16, as MTJ keeps its weights.

    Raises:
      UsageError: the name is not auto, bfloat16, float32 or float16.
    """
    if name == "auto":
        return BFLOAT16
    if not isinstance(name, str) or name not in _PARAMETER_DTYPES:
        choices = ", ".join(["auto", *_PARAMETER_DTYPES])
        raise UsageError("unknown dtype", key="dtype", expected=choices, found=repr(name))
    return _PARAMETER_DTYPES[name]


_CPU_INFO = Path("/proc/cpuinfo")
_CPU_INFO_BYTES = 16 << 10  # the first processor's entry has about 2,000; some machines have 500
# Linux's names of the instructions that multiply bfloat16 and add in float32: x86 and ARM.
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@functools.cache
def has_bfloat16_arithmetic() -> bool:
    """Whether this machine's CPU multiplies bfloat16; False where that cannot be told.

    Text is generated with float32 parameters on other CPUs, unless a dtype is chosen: XLA would
    convert the weights to float32 for every token, which takes several times as long as reading
    them. docs/generate.md has figures.
    """
    try:
        with _CPU_INFO.open("rb") as file:
            text = file.read(_CPU_INFO_BYTES).decode(errors="replace")
    except OSError:  # not Linux
        return False
    lines = (line.partition(":") for line in text.splitlines())
    flags = (value for name, _, value in lines if name.strip().lower() in ("flags", "features"))
    return not _BFLOAT16_FLAGS.isdisjoint(next(flags, "").split())
