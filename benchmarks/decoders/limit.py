"""The limit of a step: reading the weights once, and multiplying by them.

The embedding is not counted: a step reads a row of it for each token.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.checkpoint import Shape

_REPEATS = 5


def start(folder: Path, context: int) -> Callable[[int], dict[str, float]]:
    """Returns a function that measures a batch: seconds to read, and to multiply, all weights."""
    config = json.loads((folder / "config.json").read_text())
    shape = Shape(*(config[name] for name in _SIZES))
    dims = [d for name, d in shape.tensors() if "embed_in" not in name]
    memory = np.ones(sum(map(math.prod, dims)), np.float32)
    ends = np.cumsum([math.prod(d) for d in dims])[:-1]
    weights = [x.reshape(d) for x, d in zip(np.split(memory, ends), dims, strict=True)]
    matrices = [w for w in weights if w.ndim == 2]
    pool = ThreadPoolExecutor(os.cpu_count())
    parts = np.array_split(memory, os.cpu_count() or 1)

    def measure(batch: int) -> dict[str, float]:
        inputs = {w.shape[1]: np.ones((batch, w.shape[1]), np.float32) for w in matrices}
        return {
            "read": _fastest(lambda: list(pool.map(np.max, parts))),
            "matmul": _fastest(lambda: [inputs[w.shape[1]] @ w.T for w in matrices]),
        }

    return measure


_SIZES = "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs: a limit is what the machine can do undisturbed."""
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
