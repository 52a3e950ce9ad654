"""Loads from servers of the tests, and the checkpoint that these serve."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

import mtj_loader
from mtj_loader.storage.retry import RetryPolicy

FOLDER = Path("tests/data/shakespeare-neox")
FILES = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.is_file()}
FAST = RetryPolicy(attempts=6, first_wait_seconds=0.01, stalled_seconds=0.3)


def load(path, **options):
    return mtj_loader.load(path, "mp=2", progress=False, **options)


def digests(model) -> dict[str, str]:
    return {
        f"{module} {name}": hashlib.sha256(np.asarray(array).tobytes()).hexdigest()
        for module, arrays in model.params.items()
        for name, array in arrays.items()
    }
