"""Random models of transformers, and what they compute. Needs the `parity` extra."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def random_model(config: Mapping[str, Any], seed: int) -> PreTrainedModel:
    """A model in which every parameter matters: norms and biases are random as well."""
    own = copy.deepcopy(dict(config))  # transformers writes into what it is given
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


def greedy(model: PreTrainedModel, ids: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Continues prompts of equal length.

    Args:
      model: of transformers.
      ids: [b, t].
      tokens: how many to add.

    Returns:
      The new tokens [b, tokens], and for each row [b] the least lead that a chosen token had.
    """
    rows = torch.from_numpy(ids).long()
    out = model.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        pad_token_id=0,  # no prompt is padded; this only silences a warning
        max_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best_two = torch.stack(out.logits, dim=1).topk(2, dim=-1).values  # [b, tokens, 2]
    leads = (best_two[..., 0] - best_two[..., 1]).amin(dim=1)
    return out.sequences[:, ids.shape[1] :].numpy(), leads.numpy()
