"""Writes small checkpoint files, sound and broken ones."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPE_NAMES = {
    np.dtype(np.bool_): "BOOL",
    np.dtype(np.uint8): "U8",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float32): "F32",
    np.dtype(np.float64): "F64",
}


def safetensors_header(tensors: Mapping[str, np.ndarray]) -> dict:
    """The header of these tensors, one after another in the order given."""
    header, position = {}, 0
    for name, array in tensors.items():
        end = position + array.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [position, end],
        }
        position = end
    return header


def safetensors_bytes(header: str | bytes | dict, data: bytes = b"") -> bytes:
    """A file of this header, taken as it is when it is text, and this data."""
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw + data


def write_safetensors(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    header_override: str | bytes | dict | None = None,
) -> Path:
    """Writes the tensors, under another header where one is given; makes the folder."""
    header = safetensors_header(tensors) if header_override is None else header_override
    data = b"".join(array.tobytes() for array in tensors.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(safetensors_bytes(header, data))
    return path


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int | None = None) -> Path:
    """Writes `model.safetensors.index.json`."""
    metadata = {} if total_size is None else {"total_size": total_size}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    return path


def write_checkpoint(
    folder: Path,
    shards: Mapping[str, Mapping[str, np.ndarray]],
    config: Mapping[str, object] | None = None,
) -> Path:
    """Writes config.json and the files (name → tensors), with an index if there are several."""
    for file, tensors in shards.items():
        write_safetensors(folder / file, tensors)
    if len(shards) > 1:
        total = sum(array.nbytes for tensors in shards.values() for array in tensors.values())
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
        write_index(folder, weight_map, total)
    (folder / "config.json").write_text(json.dumps(dict(config or {"model_type": "gpt_neox"})))
    return folder
