"""Writes tests/data/neox_parity: tiny GPT-NeoX models, and their logits in transformers.

Needs the `parity` extra. Run from the root of the repository:

    python -m tests.oracle.make_neox_parity
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from tests.oracle.neox_cases import CASES, WITH_MODULES
from tests.oracle.random_models import logits_of, write_case

FOLDER = Path(__file__).parents[1] / "data" / "neox_parity"
SHAPE = (3, 29)  # rows and tokens: longer than the trained length of the cases with scaled rope


def modules_of(model: PreTrainedModel, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Input and output of every module for the first row, [1, t, d] each, by our names."""
    recorded: dict[str, np.ndarray] = {}

    def record(name: str, module: torch.nn.Module) -> None:
        def hook(_: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            inputs = args[0] if args else kwargs["hidden_states"]
            result = output[0] if isinstance(output, tuple) else output
            recorded[f"{name}.in"], recorded[f"{name}.out"] = inputs.numpy(), result.numpy()

        module.register_forward_hook(hook, with_kwargs=True)

    for name, module in _named_modules(model):
        record(name, module)
    logits_of(model, ids[:1])
    return recorded


def _named_modules(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module]]:
    yield "embedding", model.gpt_neox.embed_in
    yield "final_norm", model.gpt_neox.final_layer_norm
    for i, layer in enumerate(model.gpt_neox.layers):
        yield f"layer_{i}", layer
        yield f"layer_{i}.attention_norm", layer.input_layernorm
        yield f"layer_{i}.attention", layer.attention
        yield f"layer_{i}.mlp_norm", layer.post_attention_layernorm
        yield f"layer_{i}.mlp", layer.mlp


def main() -> None:
    """Rewrites every case."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    for seed, (name, config) in enumerate(CASES.items()):
        model, ids = write_case(FOLDER / name, config, SHAPE, seed)
        if name in WITH_MODULES:
            np.savez_compressed(FOLDER / name / "modules.npz", **modules_of(model, ids))


if __name__ == "__main__":
    main()
