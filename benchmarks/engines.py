"""Engines with everything compiled, so that nothing compiles during a measurement."""

from __future__ import annotations

from pathlib import Path

import mtj_loader
from mtj_loader.engine.keys import all_keys
from mtj_loader.model import Model

SLOTS = 16


def load_engine(folder: Path, context: int, *, transposed_linear: bool = False) -> Model:
    """Loads a checkpoint in float32 on one device, and compiles every program for its engine."""
    model = mtj_loader.load(
        folder,
        "mp=1",
        dtype="float32",
        transposed_linear=transposed_linear,
        slots=SLOTS,
        context_length=context,
        progress=False,
    )
    sizes = model.engine_settings.sizes
    for key in all_keys(sizes):
        if key.kind != "score":  # nobody asks for log-probabilities of prompts
            model.programs.get(sizes, key)
    return model
