"""mtj_loader with its public functions; every program is compiled before the first prompt."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.decoders.common import Decode, Decoded, Prompts, from_times
from benchmarks.engines import load_engine


def start(folder: Path, context: int) -> Decode:
    """Linear weights in Haiku's order, the default."""
    return _start(folder, context, transposed_linear=False)


def start_transposed_linear(folder: Path, context: int) -> Decode:
    """Linear weights in torch's order."""
    return _start(folder, context, transposed_linear=True)


def _start(folder: Path, context: int, *, transposed_linear: bool) -> Decode:
    model = load_engine(folder, context, transposed_linear=transposed_linear)

    def decode(prompts: Prompts, new: int) -> Decoded:
        ids: list[list[int]] = [[] for _ in prompts]
        times = [0.0] * new
        started = time.perf_counter()
        rows = model.start([list(p) for p in prompts], max_new_tokens=new, temperature=0)
        for piece in rows.pieces:
            ids[piece.row] += piece.ids
            times[len(ids[piece.row]) - 1] = time.perf_counter()
        return from_times(started, times, ids[0])

    return decode
