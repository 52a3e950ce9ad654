"""What transformers, PEFT and torch make of a variant. Needs the `parity` extra."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def logits_of_checkpoint(folder: Path, ids: np.ndarray) -> np.ndarray | None:
    """transformers' float32 logits [b, t, vocab_size]; None if it refuses the checkpoint."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            )
            return _logits(model, ids)
    except Exception:  # noqa: BLE001 - any refusal
        return None


def logits_with_adapter(base: Path, adapter: Path, ids: np.ndarray) -> np.ndarray | None:
    """PEFT's float32 logits [b, t, vocab_size]; None if it refuses the adapter."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(copy.deepcopy(_base(base)), adapter)
            return _logits(model, ids)
    except Exception:  # noqa: BLE001 - any refusal
        return None


def token_ids(folder: Path, text: str) -> list[int] | None:
    """The ids of transformers' tokenizer; None if it refuses the files or the text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    except BaseException:  # noqa: BLE001 - any refusal; the library's panics are BaseExceptions
        return None


def tensors_of_torch_file(data: bytes) -> dict[str, np.ndarray]:
    """The tensors that torch reads from a file."""
    found = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    return {name: tensor.numpy() for name, tensor in found.items()}


@functools.cache
def _base(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _logits(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids).long()).logits.float().numpy()
