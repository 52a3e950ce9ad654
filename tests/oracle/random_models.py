"""Random transformers models, and their logits and text. Needs the `parity` extra."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def random_model(config: Mapping[str, Any], seed: int) -> PreTrainedModel:
    """A model in which every parameter matters: norms and biases are random too."""
    own = copy.deepcopy(dict(config))  # transformers modifies its argument
    hf_config = AutoConfig.for_model(own.pop("model_type"), **own)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager")
    model = model.float().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
        else:
            mean = 1.0 if name.endswith("weight") else 0.0
            torch.nn.init.normal_(parameter, mean=mean, std=0.3)
    return model


def random_ids(vocab_size: int, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Token ids, int32."""
    return np.random.default_rng(seed).integers(0, vocab_size, shape).astype(np.int32)


def logits_of(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """float32 [b, t, vocab_size]."""
    with torch.no_grad():
        return model(torch.from_numpy(ids).long()).logits.float().numpy()


def write_case(
    folder: Path, config: Mapping[str, Any], shape: tuple[int, int], seed: int
) -> tuple[PreTrainedModel, np.ndarray]:
    """Writes a random model, ids.npy of a shape [b, t], and logits.npy; returns model and ids."""
    shutil.rmtree(folder, ignore_errors=True)
    model, ids = random_model(config, seed), random_ids(config["vocab_size"], shape, seed)
    logits = logits_of(model, ids)
    model.save_pretrained(folder)
    # Written from the case, because save_pretrained uses today's names.
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.save(folder / "ids.npy", ids)
    np.save(folder / "logits.npy", logits)
    size_bytes = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder.name}: {size_bytes:,} bytes, std of the logits {np.std(logits):.2f}")
    return model, ids


def greedy(model: PreTrainedModel, ids: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Continues prompts of equal length.

    Args:
      model: a transformers model.
      ids: [b, t].
      tokens: the number of tokens to add.

    Returns:
      The new tokens [b, tokens], and for each row [b] the smallest lead of a chosen token.
    """
    rows = torch.from_numpy(ids).long()
    out = model.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        pad_token_id=0,  # silences a warning; no prompt is padded
        max_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best_two = torch.stack(out.logits, dim=1).topk(2, dim=-1).values  # [b, tokens, 2]
    leads = (best_two[..., 0] - best_two[..., 1]).amin(dim=1)
    return out.sequences[:, ids.shape[1] :].numpy(), leads.numpy()
