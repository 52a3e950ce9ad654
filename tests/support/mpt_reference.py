"""MPT in float64 numpy, as mosaicml/llm-foundry defines it, for what transformers does not do.

Uses a checkpoint's own names and layouts, and no code of mtj_loader.

t time   d model   h heads   k head_dim   f feed-forward   V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]

_erf = np.vectorize(math.erf)


def random_tensors(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Float32 tensors of every parameter that llm-foundry gives a model with this config."""
    d, layers = config["d_model"], config["n_layers"]
    f = int(config["expansion_ratio"] * d)
    attention = config["attn_config"]
    bias = not config["no_bias"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (config["vocab_size"], d)}
    if config["learned_pos_emb"] and not attention["alibi"]:
        shapes["transformer.wpe.weight"] = (config["max_seq_len"], d)
    for i in range(layers):
        block = f"transformer.blocks.{i}."
        linears = {"attn.Wqkv": (3 * d, d), "attn.out_proj": (d, d)}
        linears |= {"ffn.up_proj": (f, d), "ffn.down_proj": (d, f)}
        norms = ["norm_1", "norm_2", *(["attn.q_ln", "attn.k_ln"] if attention["qk_ln"] else [])]
        shapes |= {f"{block}{name}.weight": shape for name, shape in linears.items()}
        shapes |= {f"{block}{name}.weight": (d,) for name in norms}
        if bias:
            shapes |= {f"{block}{name}.bias": shape[:1] for name, shape in linears.items()}
            shapes |= {f"{block}{name}.bias": (d,) for name in norms}
    shapes["transformer.norm_f.weight"] = (d,)
    if bias:
        shapes["transformer.norm_f.bias"] = (d,)
    return _drawn(shapes, seed)


def _drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        scale = 0.3 if len(shape) == 1 else 1.5 * shape[-1] ** -0.5
        mean = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
        tensors[name] = random.normal(mean, scale, shape).astype(np.float32)
    return tensors


def logits(config: Mapping[str, Any], tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    """float64 [b, t, V] of ids [b, t]."""
    model = _Model(config, {name: t.astype(np.float64) for name, t in tensors.items()})
    return np.stack([model.row(row) for row in ids])


@dataclass(frozen=True)
class _Model:
    config: Mapping[str, Any]
    tensors: Tensors

    def row(self, ids: np.ndarray) -> np.ndarray:  # [t] -> [t, V]
        table = self.tensors["transformer.wte.weight"]
        x = table[ids]
        if "transformer.wpe.weight" in self.tensors:
            x = x + self.tensors["transformer.wpe.weight"][: len(ids)]
        for i in range(self.config["n_layers"]):
            block = f"transformer.blocks.{i}."
            x = x + self.attention(block + "attn.", self.norm(block + "norm_1", x))
            hidden = self.linear(block + "ffn.up_proj", self.norm(block + "norm_2", x))
            hidden = hidden * (1 + _erf(hidden / math.sqrt(2))) / 2
            x = x + self.linear(block + "ffn.down_proj", hidden)
        return self.norm("transformer.norm_f", x) @ table.T * self.logit_scale

    def attention(self, at: str, x: np.ndarray) -> np.ndarray:  # [t, d] -> [t, d]
        settings = self.config["attn_config"]
        heads, (t, d) = self.config["n_heads"], x.shape
        qkv = self.linear(at + "Wqkv", x)
        if settings["clip_qkv"]:
            qkv = np.clip(qkv, -settings["clip_qkv"], settings["clip_qkv"])
        q, k, v = np.split(qkv, 3, axis=-1)
        if settings["qk_ln"]:
            q, k = self.norm(at + "q_ln", q), self.norm(at + "k_ln", k)
        q, k, v = (np.swapaxes(y.reshape(t, heads, -1), 0, 1) for y in (q, k, v))  # [h, t, k]
        scale = settings["softmax_scale"] or 1 / math.sqrt(d / heads)
        scores = q @ np.swapaxes(k, 1, 2) * scale
        if settings["alibi"]:
            scores = scores + self.slopes[:, None, None] * np.arange(1 - t, 1)
        scores = np.where(np.tri(t, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        return self.linear(at + "out_proj", np.swapaxes(weights @ v, 0, 1).reshape(t, d))

    def linear(self, at: str, x: np.ndarray) -> np.ndarray:
        return x @ self.tensors[f"{at}.weight"].T + self.tensors.get(f"{at}.bias", 0)

    def norm(self, at: str, x: np.ndarray) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config["layer_norm_epsilon"])
        return x * self.tensors[f"{at}.weight"] + self.tensors.get(f"{at}.bias", 0)

    @property
    def slopes(self) -> np.ndarray:  # [h]
        heads, steepest = self.config["n_heads"], self.config["attn_config"]["alibi_bias_max"]
        power = 1
        while power < heads:
            power *= 2
        slopes = [2.0 ** (-i * steepest / power) for i in range(1, power + 1)]
        if power != heads:
            slopes = slopes[1::2] + slopes[::2]
        return np.array(slopes[:heads])

    @property
    def logit_scale(self) -> float:
        scale = self.config["logit_scale"]
        if scale == "inv_sqrt_d_model":
            return 1 / math.sqrt(self.config["d_model"])
        return 1.0 if scale is None else scale
