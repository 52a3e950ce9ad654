"""The parameter trees of Llama and relatives, and of MPT, by simple rules in numpy.

Independent of the loader, the maps and the declarations: whole tensors, one rule after another.
Torch's linear weights are [out, in]; every array of a tree is [n, …].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tests.support.mtj_tree import ROOT, Tree

Tensors = Mapping[str, np.ndarray]

_NORMS = {
    "replicated_layer_norm": "input_layernorm",
    "replicated_layer_norm_1": "post_attention_layernorm",  # before the feed-forward
}
_GEMMA_NORMS = {
    "replicated_layer_norm": "input_layernorm",
    "replicated_layer_norm_1": "pre_feedforward_layernorm",
    "replicated_layer_norm_2": "post_attention_layernorm",
    "replicated_layer_norm_3": "post_feedforward_layernorm",
}


def decoder_tree(
    config: Mapping[str, Any],
    tensors: Tensors,
    *,
    shards: int,
    transposed_linear: bool = False,
    expert_parallel: bool = False,
) -> Tree:
    """The tree of a checkpoint.

    Args:
      config: config.json.
      tensors: by the names that transformers 5 has in memory.
      shards: n.
      transposed_linear: linear weights are [n, out, in].
      expert_parallel: whole experts are distributed over the shards.
    """
    rules = _Rules(config, tensors, shards, transposed_linear, expert_parallel)
    layers = config.get("num_hidden_layers", config.get("n_layers"))
    tree = _mpt(rules, layers) if config["model_type"] == "mpt" else _llama(rules, layers)
    return {ROOT + module: params for module, params in tree.items() if params}


def _llama(rules: _Rules, layers: int) -> Tree:
    config = rules.config
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    width = config["intermediate_size"]
    rules = replace(rules, tensors=_unfused(rules.tensors, heads, kv_heads))
    tree = {
        "embedding_shard/~/linear": {"w": rules.vocabulary("model.embed_tokens.weight")},
        "projection_shard/~/replicated_layer_norm": rules.norm("model.norm"),
        "projection_shard/~/linear": rules.projection(),
    }
    norms = _GEMMA_NORMS if config["model_type"].startswith("gemma") else _NORMS
    for i in range(layers):
        ours, theirs = f"layer_{i}/~/", f"model.layers.{i}."
        attention, mlp = theirs + "self_attn.", theirs + "mlp."
        tree |= {
            **{ours + name: rules.norm(theirs + norm) for name, norm in norms.items()},
            ours + "linear": rules.column(attention + "q_proj", heads),
            ours + "linear_1": rules.column(attention + "v_proj", kv_heads),
            ours + "linear_2": rules.column(attention + "k_proj", kv_heads),
            ours + "linear_3": rules.row(attention + "o_proj", heads),
            ours + "q_norm": rules.norm(attention + "q_norm")
            or rules.split_norm(attention + "q_layernorm", heads),
            ours + "k_norm": rules.norm(attention + "k_norm")
            or rules.split_norm(attention + "k_layernorm", kv_heads),
            ours + "linear_4": rules.column(mlp + "gate_proj", width),
            ours + "linear_5": rules.row(mlp + "down_proj", width),
            ours + "linear_6": rules.column(mlp + "up_proj", width),
            ours + "router": rules.router(mlp + "gate"),
            ours + "experts": rules.experts(mlp + "experts."),
        }
    return tree


def _unfused(tensors: Tensors, heads: int, kv_heads: int) -> Tensors:
    """Phi-3's fused tensors as Llama has them."""
    result = dict(tensors)
    for name, array in tensors.items():
        if "qkv_proj" in name:
            head_dim = len(array) // (heads + 2 * kv_heads)
            ends = [heads * head_dim, (heads + kv_heads) * head_dim]
            for part, rows in zip("qkv", np.split(array, ends), strict=True):
                result[name.replace("qkv", part)] = rows
        if "gate_up_proj.weight" in name:
            gate, up = np.split(array, 2)
            result |= {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
    return result


def _mpt(rules: _Rules, layers: int) -> Tree:
    width, heads = rules.config["d_model"], rules.config["n_heads"]
    positions = rules.tensors.get("transformer.wpe.weight")
    tree = {
        "embedding_shard/~/linear": {"w": rules.vocabulary("transformer.wte.weight")},
        "projection_shard/~/replicated_layer_norm": rules.norm("transformer.norm_f"),
        "projection_shard/~/linear": rules.projection(),
    }
    if positions is not None:
        columns = np.swapaxes(rules.blocks(positions.T, width), 1, 2)
        tree["embedding_shard"] = {"pos_embs": columns}

    def by_heads(array: np.ndarray) -> np.ndarray:  # rows [Q; K; V], each head by head
        return np.swapaxes(array.reshape(3, heads, -1, *array.shape[1:]), 0, 1).reshape(array.shape)

    for i in range(layers):
        ours, theirs = f"layer_{i}/~/", f"transformer.blocks.{i}."
        up = rules.tensors[theirs + "ffn.up_proj.weight"]
        tree |= {
            ours + "replicated_layer_norm": rules.norm(theirs + "norm_1"),
            ours + "replicated_layer_norm_1": rules.norm(theirs + "norm_2"),
            ours + "combined_qkv": rules.column(theirs + "attn.Wqkv", heads, by_heads),
            ours + "linear_3": rules.row(theirs + "attn.out_proj", heads),
            ours + "q_norm": rules.split_norm(theirs + "attn.q_ln", heads),
            ours + "k_norm": rules.split_norm(theirs + "attn.k_ln", heads),
            ours + "linear_4": rules.column(theirs + "ffn.up_proj", len(up)),
            ours + "linear_5": rules.row(theirs + "ffn.down_proj", len(up)),
        }
    return tree


@dataclass(frozen=True)
class _Rules:
    """What becomes of one source; a source that is not there gives no parameters."""

    config: Mapping[str, Any]
    tensors: Tensors
    shards: int
    transposed_linear: bool
    expert_parallel: bool

    def blocks(self, array: np.ndarray, count: int) -> np.ndarray:
        """`count` equal blocks of rows dealt over the shards; fewer blocks than shards repeat."""
        parts = array.reshape(count, -1, *array.shape[1:])
        each = max(1, count // self.shards)
        first = [j * count // self.shards for j in range(self.shards)]
        return np.stack([parts[i : i + each].reshape(-1, *array.shape[1:]) for i in first])

    def turned(self, parts: np.ndarray) -> np.ndarray:  # [n, …, out, in]
        return parts if self.transposed_linear else np.swapaxes(parts, -1, -2)

    def column(
        self, source: str, count: int, order: Callable[[np.ndarray], np.ndarray] = np.asarray
    ) -> dict[str, np.ndarray]:
        if f"{source}.weight" not in self.tensors:
            return {}
        params = {"w": self.turned(self.blocks(order(self.tensors[f"{source}.weight"]), count))}
        bias = self.tensors.get(f"{source}.bias")
        return params if bias is None else {**params, "b": self.blocks(order(bias), count)}

    def row(self, source: str, count: int) -> dict[str, np.ndarray]:
        if f"{source}.weight" not in self.tensors:
            return {}
        parts = self.blocks(self.tensors[f"{source}.weight"].T, count)  # [n, in/n, out]
        params = {"w": self.turned(np.swapaxes(parts, 1, 2))}
        bias = self.tensors.get(f"{source}.bias")
        if bias is None:
            return params
        return {**params, "b": self.copies(bias / np.float32(self.shards))}

    def norm(self, source: str) -> dict[str, np.ndarray]:
        names = {"scale": f"{source}.weight", "offset": f"{source}.bias"}
        there = {param: name for param, name in names.items() if name in self.tensors}
        return {param: self.copies(self.tensors[name]) for param, name in there.items()}

    def split_norm(self, source: str, count: int) -> dict[str, np.ndarray]:
        whole = self.norm(source)
        return {param: self.blocks(copies[0], count) for param, copies in whole.items()}

    def vocabulary(self, source: str) -> np.ndarray:
        table = self.tensors[source]
        padded = np.pad(table, ((0, -len(table) % self.shards), (0, 0)))
        return self.blocks(padded, len(padded))

    def projection(self) -> dict[str, np.ndarray]:
        if "lm_head.weight" not in self.tensors:
            return {}
        return {"w": self.turned(self.vocabulary("lm_head.weight"))}

    def router(self, source: str) -> dict[str, np.ndarray]:
        if f"{source}.weight" not in self.tensors:
            return {}
        return {"w": self.turned(self.copies(self.tensors[f"{source}.weight"]))}

    def experts(self, source: str) -> dict[str, np.ndarray]:
        """gate_up is [E, gate then up, d]; a shard has its gate rows, then its up rows."""
        if source + "down_proj" not in self.tensors:
            return {}
        gate_up, down = self.tensors[source + "gate_up_proj"], self.tensors[source + "down_proj"]
        if self.expert_parallel:
            gate_up, down = (self.blocks(array, len(array)) for array in (gate_up, down))
        else:
            halves = [np.split(half, self.shards, 1) for half in np.split(gate_up, 2, 1)]
            gate_up = np.stack([np.concatenate(pair, 1) for pair in zip(*halves, strict=True)])
            down = np.stack(np.split(down, self.shards, 2))
        return {"gate_up": self.turned(gate_up), "down": self.turned(down)}

    def copies(self, array: np.ndarray) -> np.ndarray:
        return np.stack([array] * self.shards)
