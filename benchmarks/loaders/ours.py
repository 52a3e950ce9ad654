"""mtj_loader with its public function; planning is part of the time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from jax.sharding import Mesh

from benchmarks.loaders.common import LoadResult, device_bytes
from mtj_loader import load as load_model
from mtj_loader.loading.verify import verify


def load(folder: Path, mesh: Mesh) -> LoadResult:
    """Loads with the transposes that Haiku's linear weights need."""
    return _load(folder, mesh, transposed_linear=False)


def load_transposed_linear(folder: Path, mesh: Mesh) -> LoadResult:
    """Loads linear weights in torch's order."""
    return _load(folder, mesh, transposed_linear=True)


def _load(folder: Path, mesh: Mesh, *, transposed_linear: bool) -> LoadResult:
    model = load_model(folder, mesh, transposed_linear=transposed_linear, progress=False)
    return LoadResult(
        partial(device_bytes, model.params),
        lambda: verify(model.plan, model.params),
        model.report.bytes_read,
        {"seconds": model.report.seconds},
    )
