"""transformers' `from_pretrained` in bfloat16: one torch model in host memory, not sharded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jax.sharding import Mesh
from transformers import GPTNeoXForCausalLM

from benchmarks.contenders.common import Loaded, check_equal


def load(folder: Path, mesh: Mesh) -> Loaded:
    """Into memory, as every other contender does; the mesh plays no part."""
    return _load(folder, disable_mmap=True)


def load_mapped(folder: Path, mesh: Mesh) -> Loaded:
    """As it is called by default: the tensors map the files, and no weight is read before use."""
    return _load(folder)


def _load(folder: Path, **options: bool) -> Loaded:
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    state = model.state_dict()
    return Loaded(
        lambda: sum(tensor.nbytes for tensor in state.values()),
        lambda: check_equal(folder, lambda name: _array(state, name)),
    )


def _array(state: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """A tensor by its name in the files, which transformers 5 changes for one of them."""
    return state[name.replace("embed_out", "lm_head")].view(torch.uint16).numpy()
