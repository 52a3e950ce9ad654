"""Synthetic checkpoints; those of published sizes are written once and kept.

The weights are random, so that a check notices any two swapped elements, and finite and small, so
that no loader rejects them. Files are split and ordered as in transformers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FILE_BYTES = 2_000_000_000  # several files for all but the smallest shapes
_ITEM_BYTES = 2  # bfloat16
_CHUNK_BYTES = 32 << 20  # generated and written at a time


@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT-NeoX model (Biderman et al., 2023, arXiv:2304.01373, table 1)."""

    layers: int
    d_model: int
    heads: int
    vocab_size: int = 50304

    def config(self) -> dict[str, object]:
        """The content of config.json."""
        return {
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": "gpt_neox",
            "num_hidden_layers": self.layers,
            "hidden_size": self.d_model,
            "num_attention_heads": self.heads,
            "intermediate_size": 4 * self.d_model,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 2048,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": True,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name and shape, in the order of transformers' state dict."""
        d, f, vocab = self.d_model, 4 * self.d_model, self.vocab_size
        yield "gpt_neox.embed_in.weight", (vocab, d)
        for i in range(self.layers):
            layer = f"gpt_neox.layers.{i}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"{layer}{norm}.weight", (d,)
                yield f"{layer}{norm}.bias", (d,)
            for name, rows, columns in (
                ("attention.query_key_value", 3 * d, d),
                ("attention.dense", d, d),
                ("mlp.dense_h_to_4h", f, d),
                ("mlp.dense_4h_to_h", d, f),
            ):
                yield f"{layer}{name}.weight", (rows, columns)
                yield f"{layer}{name}.bias", (rows,)
        yield "gpt_neox.final_layer_norm.weight", (d,)
        yield "gpt_neox.final_layer_norm.bias", (d,)
        yield "embed_out.weight", (vocab, d)


@dataclass(frozen=True)
class Mixture:
    """The sizes of a mixture of experts (Jiang et al., 2024, arXiv:2401.04088)."""

    layers: int
    experts: int
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    vocab_size: int

    def config(self) -> dict[str, object]:
        """The content of config.json."""
        return {
            "model_type": "mixtral",
            "hidden_size": self.d_model,
            "intermediate_size": self.d_ff,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_hidden_layers": self.layers,
            "num_local_experts": self.experts,
            "num_experts_per_tok": 8,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name and shape; every weight of every expert is a tensor."""
        d, f, kv = self.d_model, self.d_ff, self.d_model * self.kv_heads // self.heads
        yield "model.embed_tokens.weight", (self.vocab_size, d)
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            yield f"{layer}input_layernorm.weight", (d,)
            yield f"{layer}post_attention_layernorm.weight", (d,)
            for name, rows in (("q", d), ("k", kv), ("v", kv), ("o", d)):
                yield f"{layer}self_attn.{name}_proj.weight", (rows, d)
            yield f"{layer}block_sparse_moe.gate.weight", (self.experts, d)
            for e in range(self.experts):
                expert = f"{layer}block_sparse_moe.experts.{e}."
                yield f"{expert}w1.weight", (f, d)
                yield f"{expert}w2.weight", (d, f)
                yield f"{expert}w3.weight", (f, d)
        yield "model.norm.weight", (d,)
        yield "lm_head.weight", (self.vocab_size, d)


SHAPES = {
    "pythia-160m": Shape(12, 768, 12),
    "pythia-410m": Shape(24, 1024, 16),
    "pythia-1.4b": Shape(24, 2048, 16),
    "pythia-2.8b": Shape(32, 2560, 32),
    "pythia-6.9b": Shape(32, 4096, 32, vocab_size=50432),
}


def checkpoint(name: str, cache: Path, file_bytes: int = FILE_BYTES) -> Path:
    """The folder with the checkpoint of a shape in SHAPES, written if it does not exist."""
    folder = cache / f"{name}-{file_bytes}"
    if not (folder / "config.json").exists():
        write(SHAPES[name], folder, file_bytes)
    return folder


def write(shape: Shape | Mixture, folder: Path, file_bytes: int = FILE_BYTES) -> None:
    """Writes weights, index and config.json; config.json comes last and marks a complete folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.SFC64(0))
    groups = list(_files(shape, file_bytes))
    weight_map = {}
    for i, group in enumerate(groups, 1):
        file = f"model-{i:05}-of-{len(groups):05}.safetensors"
        weight_map |= dict.fromkeys(group, file)
        _write_file(folder / file, group, rng)
    total = sum(map(_size_bytes, (dims for group in groups for dims in group.values())))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))


def _files(shape: Shape | Mixture, file_bytes: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Name → shape for each file: split in the state dict's order, then sorted by name."""
    group: dict[str, tuple[int, ...]] = {}
    total = 0
    for name, dims in shape.tensors():
        if group and total + _size_bytes(dims) > file_bytes:
            yield dict(sorted(group.items()))
            group, total = {}, 0
        group[name] = dims
        total += _size_bytes(dims)
    yield dict(sorted(group.items()))


def _write_file(path: Path, tensors: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims in tensors.items():
        stop = offset + _size_bytes(dims)
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data to 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, offset, _CHUNK_BYTES):
            file.write(_weights(rng, min(_CHUNK_BYTES, offset - start)))
        file.flush()
        os.fsync(file.fileno())  # so the disk is idle during a measurement


def _weights(rng: np.random.Generator, size_bytes: int) -> bytes:
    """Random bfloat16 numbers from 2⁻⁷ to 2⁻³ with random signs."""
    bits = np.frombuffer(rng.bytes(size_bytes), np.uint16)
    return ((bits & 0x81FF) | 0x3C00).tobytes()


def _size_bytes(dims: tuple[int, ...]) -> int:
    return int(np.prod(dims)) * _ITEM_BYTES
