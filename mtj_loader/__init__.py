"""Hugging Face checkpoints onto JAX device meshes, as Mesh Transformer JAX's Haiku parameters."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from mtj_loader.errors import (
    AdapterError,
    AdapterMismatchError,
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    DeviceError,
    FormatError,
    MachineError,
    MapError,
    MemoryLimitError,
    MeshError,
    MtjLoaderError,
    NonFiniteError,
    Problem,
    PromptError,
    StorageError,
    TokenizerMissingError,
    UsageError,
    VerifyError,
)

if TYPE_CHECKING:
    from mtj_loader.api import Model, load, plan
    from mtj_loader.loading.plan import LoadPlan
    from mtj_loader.loading.report import LoadReport
    from mtj_loader.loading.topology import make_abstract_mesh, make_mesh

try:
    __version__ = version("mtj-loader")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AdapterError",
    "AdapterMismatchError",
    "CheckpointError",
    "CheckpointMismatchError",
    "ConfigError",
    "DeviceError",
    "FormatError",
    "LoadPlan",
    "LoadReport",
    "MachineError",
    "MapError",
    "MemoryLimitError",
    "MeshError",
    "Model",
    "MtjLoaderError",
    "NonFiniteError",
    "Problem",
    "PromptError",
    "StorageError",
    "TokenizerMissingError",
    "UsageError",
    "VerifyError",
    "load",
    "make_abstract_mesh",
    "make_mesh",
    "plan",
]

# What needs JAX, and its module: imported when first asked for, since JAX takes a second to import
# and half of the command line does without.
_NEEDS_JAX = {
    "LoadPlan": "mtj_loader.loading.plan",
    "LoadReport": "mtj_loader.loading.report",
    "Model": "mtj_loader.api",
    "load": "mtj_loader.api",
    "make_abstract_mesh": "mtj_loader.loading.topology",
    "make_mesh": "mtj_loader.loading.topology",
    "plan": "mtj_loader.api",
}


def __getattr__(name: str) -> object:
    if name not in _NEEDS_JAX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_NEEDS_JAX[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_NEEDS_JAX]
