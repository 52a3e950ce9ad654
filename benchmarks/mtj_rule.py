"""What Mesh Transformer JAX's shards of GPT-NeoX are, by numpy from the files, tensor by tensor.

Nothing here comes from mtj_loader: it is what its loads are compared with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from benchmarks.sparse import Hole

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_CHUNK = 64  # rows that a transpose takes at a time: their lines stay in the first-level cache
_THREADS = 2  # each holds one tensor and one of its shards

# The end of a tensor's name → module and parameter in its layer, and how it is cut.
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


def digests(holes: list[Hole], shards: int) -> dict[str, dict[str, str]]:
    """SHA-256 of every shard of every parameter: "module param" → number → digest."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(pool.map(lambda hole: _of_tensor(hole, shards), holes))


def _of_tensor(hole: Hole, shards: int) -> tuple[str, dict[str, str]]:
    target, cut = _rule(hole.name)
    data = np.fromfile(hole.file, np.uint16, hole.size_bytes // 2, offset=hole.offset_bytes)
    made = enumerate(_shards(data.reshape(hole.dims), cut, shards))
    return f"causal_transformer_shard/~/{target}", {str(j): _sha256(one) for j, one in made}


def _rule(name: str) -> tuple[str, str]:
    if name in _STATIC:
        return _STATIC[name]
    number, _, rest = name.removeprefix("gpt_neox.layers.").partition(".")
    target, cut = _LAYER[rest]
    return f"layer_{number}/~/{target}", cut


def _shards(tensor: np.ndarray, cut: str, shards: int) -> Iterator[np.ndarray]:
    """The bits of each shard in turn, row-major; weights become [in, out]."""
    if cut == "rows":  # the vocabulary, and biases of outputs that are split
        padding = [(0, -len(tensor) % shards)] + [(0, 0)] * (tensor.ndim - 1)
        yield from np.split(np.pad(tensor, padding), shards)
    elif cut == "outputs":
        padded = np.pad(tensor, [(0, -len(tensor) % shards), (0, 0)])
        yield from map(_transposed, np.split(padded, shards))
    elif cut == "inputs":
        yield from map(_transposed, np.split(tensor, shards, axis=1))
    elif cut == "divided":  # every shard adds its copy before the sum over shards
        wide = tensor.view(_BFLOAT16).astype(np.float32) / np.float32(shards)
        yield from [wide.astype(_BFLOAT16).view(np.uint16)] * shards
    else:
        yield from [tensor] * shards


def _transposed(matrix: np.ndarray) -> np.ndarray:
    made = np.empty(matrix.shape[::-1], matrix.dtype)
    for start in range(0, len(matrix), _CHUNK):
        made[:, start : start + _CHUNK] = matrix[start : start + _CHUNK].T
    return made


def _sha256(shard: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(shard).data).hexdigest()
