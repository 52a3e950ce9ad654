"""MTJ's parameter tree of a GPT-NeoX checkpoint, by MTJ's rules in simple numpy.

Independent of the loader and of the map: whole tensors, one rule after another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

ROOT = "causal_transformer_shard/~/"
Tree = dict[str, dict[str, np.ndarray]]


def neox_tree(
    tensors: Mapping[str, np.ndarray], *, layers: int, shards: int, transposed_linear: bool
) -> Tree:
    """Every array is [shards, ...]."""
    rules = _Rules(tensors, shards, transposed_linear)
    tree = {
        "embedding_shard/~/linear": {"w": rules.rows("gpt_neox.embed_in.weight")},
        "projection_shard/~/replicated_layer_norm": rules.norm("gpt_neox.final_layer_norm"),
    }
    if "embed_out.weight" in tensors:
        parts = rules.rows("embed_out.weight")
        tree["projection_shard/~/linear"] = {"w": rules.turned(parts)}
    for i in range(layers):
        ours, theirs = f"layer_{i}/~/", f"gpt_neox.layers.{i}."
        tree |= {
            ours + "replicated_layer_norm": rules.norm(theirs + "input_layernorm"),
            ours + "replicated_layer_norm_1": rules.norm(theirs + "post_attention_layernorm"),
            ours + "combined_qkv": rules.column(theirs + "attention.query_key_value"),
            ours + "linear_3": rules.row(theirs + "attention.dense"),
            ours + "linear_4": rules.column(theirs + "mlp.dense_h_to_4h"),
            ours + "linear_5": rules.row(theirs + "mlp.dense_4h_to_h"),
        }
    return {ROOT + module: params for module, params in tree.items()}


@dataclass(frozen=True)
class _Rules:
    """What MTJ does with one source; torch's linear weights are [out, in]."""

    tensors: Mapping[str, np.ndarray]
    shards: int
    transposed_linear: bool

    def norm(self, source: str) -> dict[str, np.ndarray]:
        scale, offset = self.tensors[f"{source}.weight"], self.tensors[f"{source}.bias"]
        return {"scale": self.copies(scale), "offset": self.copies(offset)}

    def column(self, source: str) -> dict[str, np.ndarray]:
        """Outputs are split, and the bias with them."""
        params = {"w": self.turned(self.split(self.tensors[f"{source}.weight"], 0))}
        bias = self.tensors.get(f"{source}.bias")
        return params if bias is None else {**params, "b": self.split(bias, 0)}

    def row(self, source: str) -> dict[str, np.ndarray]:
        """Inputs are split; every shard adds its part of the bias."""
        params = {"w": self.turned(self.split(self.tensors[f"{source}.weight"], 1))}
        bias = self.tensors.get(f"{source}.bias")
        if bias is None:
            return params
        part = bias.astype(np.float32) / np.float32(self.shards)
        return {**params, "b": self.copies(part.astype(bias.dtype))}

    def rows(self, source: str) -> np.ndarray:
        """A table by vocabulary, padded with zeros."""
        table = self.tensors[source]
        return self.split(np.pad(table, ((0, -len(table) % self.shards), (0, 0))), 0)

    def turned(self, parts: np.ndarray) -> np.ndarray:
        return parts if self.transposed_linear else np.swapaxes(parts, 1, 2)

    def split(self, array: np.ndarray, axis: int) -> np.ndarray:
        return np.stack(np.split(array, self.shards, axis))

    def copies(self, array: np.ndarray) -> np.ndarray:
        return np.stack([array] * self.shards)


def sha256(array: np.ndarray) -> str:
    """Of the array as little-endian float32 in C order."""
    return hashlib.sha256(array.astype("<f4").tobytes()).hexdigest()
