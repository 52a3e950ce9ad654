"""A tiny GPT-NeoX checkpoint, made here, for tests that break one thing at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests.support.checkpoints import write_checkpoint

CONFIG: dict[str, object] = {
    "model_type": "gpt_neox",
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "vocab_size": 29,
    "max_position_embeddings": 32,
    "rotary_pct": 0.5,
}


def tensors(dtype: np.dtype | type = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """All tensors that transformers would save for CONFIG, random."""
    d, f, vocab = 24, 40, 29
    shapes: dict[str, tuple[int, ...]] = {"gpt_neox.embed_in.weight": (vocab, d)}
    for i in range(2):
        layer = f"gpt_neox.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (d,),
            layer + "input_layernorm.bias": (d,),
            layer + "post_attention_layernorm.weight": (d,),
            layer + "post_attention_layernorm.bias": (d,),
            layer + "attention.query_key_value.weight": (3 * d, d),
            layer + "attention.query_key_value.bias": (3 * d,),
            layer + "attention.dense.weight": (d, d),
            layer + "attention.dense.bias": (d,),
            layer + "mlp.dense_h_to_4h.weight": (f, d),
            layer + "mlp.dense_h_to_4h.bias": (f,),
            layer + "mlp.dense_4h_to_h.weight": (d, f),
            layer + "mlp.dense_4h_to_h.bias": (d,),
        }
    shapes |= {
        "gpt_neox.final_layer_norm.weight": (d,),
        "gpt_neox.final_layer_norm.bias": (d,),
        "embed_out.weight": (vocab, d),
    }
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write(
    folder: Path,
    arrays: Mapping[str, np.ndarray] | None = None,
    **config: object,
) -> Path:
    """Writes a checkpoint of one file; keywords change CONFIG."""
    arrays = tensors() if arrays is None else arrays
    return write_checkpoint(folder, {"model.safetensors": arrays}, CONFIG | config)
