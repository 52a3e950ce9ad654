"""Checkpoints to convert, and what is checked of conversions."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import mtj_loader
from tests.support.checkpoints import write_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
RANDOM = np.random.default_rng(0)


def bfloat16(*shape):
    return RANDOM.normal(size=shape).astype(BF16)


TENSORS = {
    "h.0.w": bfloat16(5, 7),
    "h.1.w": bfloat16(5, 7),
    "bias": np.array([1, 2, -3], np.float32),
    "wide": np.array([0.1, 1e-3]),
    "mask": np.array([[True, False, True]]),
    "ids": np.array([2**40, -1]),
    "scalar": np.array(0.5, BF16),
    "empty": np.empty((0, 3), np.float32),
}


def write(folder: Path, tensors=TENSORS, **config) -> Path:
    config = {"model_type": "mpt", "torch_dtype": "bfloat16", "d_model": 4} | config
    return write_checkpoint(folder, {"model.safetensors": tensors}, config)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refusal(kind, *arguments, **options) -> str:
    with pytest.raises(kind) as caught:
        mtj_loader.convert(*arguments, **options)
    assert type(caught.value) is kind
    return f"{caught.value}\n"


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
