"""Writes small LoRA adapters with PEFT's names, and merges them by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from tests.support.checkpoints import write_safetensors

CONFIG: dict[str, object] = {
    "peft_type": "LORA",
    "r": 3,
    "lora_alpha": 5,
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "use_dora": False,
}


def write_adapter(folder: Path, tensors: Mapping[str, np.ndarray], **config: object) -> Path:
    """Writes an adapter of all modules that the tensors name; keywords change CONFIG."""
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    settings = CONFIG | {"target_modules": modules_of(tensors)} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def modules_of(tensors: Iterable[str]) -> list[str]:
    """The last parts of the names of the modules that have factors."""
    found = (re.search(r"([^.]+)\.lora_(?:embedding_)?[AB]\b", name) for name in tensors)
    return sorted({match[1] for match in found if match})


def linear(module: str, outs: int, ins: int, rank: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Random factors of one linear layer."""
    random = np.random.default_rng(seed)
    name = f"base_model.model.{module}"
    return {
        f"{name}.lora_A.weight": random.normal(size=(rank, ins)).astype(np.float32),
        f"{name}.lora_B.weight": random.normal(size=(outs, rank)).astype(np.float32),
    }


def merged(
    weights: Mapping[str, np.ndarray], adapter: Mapping[str, np.ndarray], scale: float
) -> dict[str, np.ndarray]:
    """The weights with scale · B · A added, in float64, rounded to float32 once."""
    result = dict(weights)
    for name, a in adapter.items():
        if name.endswith(".lora_A.weight"):
            b = adapter[name.replace("lora_A", "lora_B")]
            base = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            total = result[base].astype(np.float64) + scale * (b.astype(np.float64) @ a)
            result[base] = total.astype(np.float32)
    return result


# An adapter of `tests.support.neox`.
QKV = "gpt_neox.layers.{}.attention.query_key_value"
DENSE = "gpt_neox.layers.{}.attention.dense"
UP = "gpt_neox.layers.{}.mlp.dense_h_to_4h"
TERMS = (
    linear(QKV.format(0), 72, 24, seed=1)
    | linear(DENSE.format(1), 24, 24, seed=2)
    | linear(UP.format(1), 40, 24, seed=3)
    | linear("embed_out", 29, 24, seed=4)
)
