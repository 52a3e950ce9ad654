"""Loads Hugging Face checkpoints onto JAX meshes as Mesh Transformer JAX's Haiku parameters."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from mtj_loader.errors import (
    AdapterError,
    AdapterMismatchError,
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    DeviceError,
    FormatError,
    GrammarError,
    HostError,
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
from mtj_loader.version import version

if TYPE_CHECKING:
    from mtj_loader.api import load, plan
    from mtj_loader.conversion.convert_checkpoint import ConvertReport, convert
    from mtj_loader.loading.load_report import LoadReport
    from mtj_loader.model import Model
    from mtj_loader.planning.load_plan import LoadPlan
    from mtj_loader.planning.topology import make_abstract_mesh, make_mesh

    __version__: str

__all__ = [
    "AdapterError",
    "AdapterMismatchError",
    "CheckpointError",
    "CheckpointMismatchError",
    "ConfigError",
    "ConvertReport",
    "DeviceError",
    "FormatError",
    "GrammarError",
    "HostError",
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
    "convert",
    "load",
    "make_abstract_mesh",
    "make_mesh",
    "plan",
]

# Names that are imported on first use, and their modules. Most need JAX, which takes a second to
# import, and half of the commands run without it.
_LAZY = {
    "ConvertReport": "mtj_loader.conversion.convert_checkpoint",
    "LoadPlan": "mtj_loader.planning.load_plan",
    "LoadReport": "mtj_loader.loading.load_report",
    "Model": "mtj_loader.model",
    "convert": "mtj_loader.conversion.convert_checkpoint",
    "load": "mtj_loader.api",
    "make_abstract_mesh": "mtj_loader.planning.topology",
    "make_mesh": "mtj_loader.planning.topology",
    "plan": "mtj_loader.api",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return version()
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_LAZY]
