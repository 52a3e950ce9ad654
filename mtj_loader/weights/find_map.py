"""Finding a family's weight map: `configs/`, from the wheel or from a checkout."""

from __future__ import annotations

from pathlib import Path

from mtj_loader.errors import MapError
from mtj_loader.weights.map_reader import read_map
from mtj_loader.weights.weight_map import WeightMap

_PACKAGE = Path(__file__).resolve().parent.parent
# The wheel carries the maps inside the package; a checkout has them beside it.
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def find_map(model_type: str, path: Path | None = None) -> WeightMap:
    """The map at `path`, or the one that comes with mtj_loader for this family.

    Raises:
      MapError: there is none, or it is malformed.
    """
    if path is not None:
        return read_map(path)
    for folder in _FOLDERS:
        if (folder / f"{model_type}.json").is_file():
            return read_map(folder / f"{model_type}.json")
    raise MapError("there is no weight map for this family", key="model_type", found=model_type)
