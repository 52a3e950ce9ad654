"""mtj_loader, called as anybody calls it; planning is part of the time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from jax.sharding import Mesh

from benchmarks.contenders.common import Loaded, device_bytes
from mtj_loader import load as load_model
from mtj_loader.loading.verify import verify


def load(folder: Path, mesh: Mesh) -> Loaded:
    """With the transposes that Haiku's linear weights need."""
    return _load(folder, mesh, transposed_linear=False)


def load_transposed_linear(folder: Path, mesh: Mesh) -> Loaded:
    """With linear weights in torch's order."""
    return _load(folder, mesh, transposed_linear=True)


def _load(folder: Path, mesh: Mesh, *, transposed_linear: bool) -> Loaded:
    model = load_model(folder, mesh, transposed_linear=transposed_linear, progress=False)
    return Loaded(
        partial(device_bytes, model.params),
        lambda: verify(model.plan, model.params),
        model.report.bytes_read,
        {"seconds": model.report.seconds},
    )
