"""Writes tests/data/neox_parity: tiny GPT-NeoX models, and the logits transformers gives for them.

Needs the `parity` extra. Run from the root of the repository:

    python -m tests.oracle.make_neox_parity
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from tests.oracle.neox_cases import CASES, WITH_MODULES

FOLDER = Path(__file__).parents[1] / "data" / "neox_parity"
ROWS, TOKENS = 3, 29  # more tokens than the trained length of the cases with stretched rope


def random_model(config: dict[str, Any], seed: int) -> GPTNeoXForCausalLM:
    """A model in which every parameter matters: norms and biases are random as well."""
    torch.manual_seed(seed)
    own = copy.deepcopy(config)  # transformers writes into what it is given
    hf_config = GPTNeoXConfig.from_dict(own, attn_implementation="eager")
    model = GPTNeoXForCausalLM(hf_config).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    return model


def random_ids(config: dict[str, Any], seed: int) -> np.ndarray:
    """int32 [ROWS, TOKENS]."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, config["vocab_size"], (ROWS, TOKENS)).astype(np.int32)


def logits_of(model: GPTNeoXForCausalLM, ids: np.ndarray) -> np.ndarray:
    """float32 [b, t, vocab_size]."""
    with torch.no_grad():
        return model(torch.from_numpy(ids).long()).logits.float().numpy()


def modules_of(model: GPTNeoXForCausalLM, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Input and output of the modules for the first row, [1, t, d] each, by our names for them."""
    seen: dict[str, np.ndarray] = {}

    def record(name: str, module: torch.nn.Module) -> None:
        def hook(_: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            inputs = args[0] if args else kwargs["hidden_states"]
            result = output[0] if isinstance(output, tuple) else output
            seen[f"{name}.in"], seen[f"{name}.out"] = inputs.numpy(), result.numpy()

        module.register_forward_hook(hook, with_kwargs=True)

    for name, module in _named_modules(model):
        record(name, module)
    logits_of(model, ids[:1])
    return seen


def _named_modules(model: GPTNeoXForCausalLM) -> Iterator[tuple[str, torch.nn.Module]]:
    yield "embedding", model.gpt_neox.embed_in
    yield "final_norm", model.gpt_neox.final_layer_norm
    for i, layer in enumerate(model.gpt_neox.layers):
        yield f"layer_{i}", layer
        yield f"layer_{i}.attention_norm", layer.input_layernorm
        yield f"layer_{i}.attention", layer.attention
        yield f"layer_{i}.mlp_norm", layer.post_attention_layernorm
        yield f"layer_{i}.mlp", layer.mlp


def _write(folder: Path, config: dict[str, Any], seed: int) -> None:
    model, ids = random_model(config, seed), random_ids(config, seed)
    logits = logits_of(model, ids)
    model.save_pretrained(folder)
    # As the case spells it: save_pretrained would bring it to today's spelling.
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.save(folder / "ids.npy", ids)
    np.save(folder / "logits.npy", logits)
    if folder.name in WITH_MODULES:
        np.savez_compressed(folder / "modules.npz", **modules_of(model, ids))
    print(f"{folder.name}: logits of {np.std(logits):.2f} standard deviation")


def main() -> None:
    """Writes every case anew."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    for seed, (name, config) in enumerate(CASES.items()):
        _write(FOLDER / name, config, seed)


if __name__ == "__main__":
    main()
