"""transformers' `from_pretrained` in bfloat16: one torch model in host memory, not sharded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jax.sharding import Mesh
from transformers import GPTNeoXForCausalLM

from benchmarks.loaders.common import LoadResult, check_equal


def load(folder: Path, mesh: Mesh) -> LoadResult:
    """Loads into memory, as the other loaders do; the mesh is not used."""
    return _load(folder, disable_mmap=True)


def load_mapped(folder: Path, mesh: Mesh) -> LoadResult:
    """Loads with the default options: tensors map the files, and no weight is read before use."""
    return _load(folder)


def _load(folder: Path, **options: bool) -> LoadResult:
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    state = model.state_dict()
    return LoadResult(
        lambda: sum(tensor.nbytes for tensor in state.values()),
        lambda: check_equal(folder, lambda name: _array(state, name)),
    )


def _array(state: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """A tensor by its name in the files; transformers 5 renames one of them."""
    return state[name.replace("embed_out", "lm_head")].view(torch.uint16).numpy()
