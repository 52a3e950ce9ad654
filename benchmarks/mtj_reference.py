"""Mesh Transformer JAX's shards of GPT-NeoX, computed from the files with numpy.

This uses nothing of mtj_loader: it is the reference for its loads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from benchmarks.sparse import SparseTensor

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_CHUNK = 64  # rows transposed at a time, so that their cache lines stay in L1
_THREADS = 2  # each holds one tensor and one shard of it

# Suffix of a tensor's name → module and parameter in its layer, how it is split.
_LAYER = {
    "input_layernorm.weight": ("replicated_layer_norm scale", "copies"),
    "input_layernorm.bias": ("replicated_layer_norm offset", "copies"),
    "post_attention_layernorm.weight": ("replicated_layer_norm_1 scale", "copies"),
    "post_attention_layernorm.bias": ("replicated_layer_norm_1 offset", "copies"),
    "attention.query_key_value.weight": ("combined_qkv w", "outputs"),
    "attention.query_key_value.bias": ("combined_qkv b", "rows"),
    "attention.dense.weight": ("linear_3 w", "inputs"),
    "attention.dense.bias": ("linear_3 b", "divided"),
    "mlp.dense_h_to_4h.weight": ("linear_4 w", "outputs"),
    "mlp.dense_h_to_4h.bias": ("linear_4 b", "rows"),
    "mlp.dense_4h_to_h.weight": ("linear_5 w", "inputs"),
    "mlp.dense_4h_to_h.bias": ("linear_5 b", "divided"),
}
_STATIC = {
    "gpt_neox.embed_in.weight": ("embedding_shard/~/linear w", "rows"),
    "gpt_neox.final_layer_norm.weight": (
        "projection_shard/~/replicated_layer_norm scale",
        "copies",
    ),
    "gpt_neox.final_layer_norm.bias": (
        "projection_shard/~/replicated_layer_norm offset",
        "copies",
    ),
    "embed_out.weight": ("projection_shard/~/linear w", "outputs"),
}


def digests(records: list[SparseTensor], shards: int) -> dict[str, dict[str, str]]:
    """SHA-256 of every shard of every parameter: "module param" → number → digest."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(pool.map(lambda record: _tensor_digests(record, shards), records))


def _tensor_digests(record: SparseTensor, shards: int) -> tuple[str, dict[str, str]]:
    target, split = _rule(record.name)
    data = np.fromfile(record.file, np.uint16, record.size_bytes // 2, offset=record.offset_bytes)
    parts = enumerate(_shards(data.reshape(record.dims), split, shards))
    return f"causal_transformer_shard/~/{target}", {str(j): _sha256(part) for j, part in parts}


def _rule(name: str) -> tuple[str, str]:
    if name in _STATIC:
        return _STATIC[name]
    number, _, rest = name.removeprefix("gpt_neox.layers.").partition(".")
    target, split = _LAYER[rest]
    return f"layer_{number}/~/{target}", split


def _shards(tensor: np.ndarray, split: str, shards: int) -> Iterator[np.ndarray]:
    """Yields the bits of each shard, row-major; weights become [in, out]."""
    if split == "rows":  # the vocabulary, and biases of split outputs
        padding = [(0, -len(tensor) % shards)] + [(0, 0)] * (tensor.ndim - 1)
        yield from np.split(np.pad(tensor, padding), shards)
    elif split == "outputs":
        padded = np.pad(tensor, [(0, -len(tensor) % shards), (0, 0)])
        yield from map(_transpose, np.split(padded, shards))
    elif split == "inputs":
        yield from map(_transpose, np.split(tensor, shards, axis=1))
    elif split == "divided":  # every shard adds its copy before the sum over shards
        wide = tensor.view(_BFLOAT16).astype(np.float32) / np.float32(shards)
        yield from [wide.astype(_BFLOAT16).view(np.uint16)] * shards
    else:
        yield from [tensor] * shards


def _transpose(matrix: np.ndarray) -> np.ndarray:
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    for start in range(0, len(matrix), _CHUNK):
        result[:, start : start + _CHUNK] = matrix[start : start + _CHUNK].T
    return result


def _sha256(shard: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(shard).data).hexdigest()
