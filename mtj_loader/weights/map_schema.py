"""The vocabulary of weight maps: what `configs/schema.json` allows in the places of a map."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent.parent
# In a wheel the maps are inside the package; in a checkout they are beside it.
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


@dataclass(frozen=True)
class Vocabulary:
    """Names that a map may use.

    Attributes:
      families, positions: the values of `mtj_compat` and `mtj_pe`.
      config_keys, required_config_keys: the keys of `mtj_config_map`.
      params: the names of parameters.
      static_module, layer_module: patterns of module paths.
      transforms: name → whether a map writes it as an object, `{"op": name}`.
    """

    families: tuple[str, ...]
    positions: tuple[str, ...]
    config_keys: tuple[str, ...]
    required_config_keys: tuple[str, ...]
    params: tuple[str, ...]
    static_module: re.Pattern[str]
    layer_module: re.Pattern[str]
    transforms: dict[str, bool]


@cache
def vocabulary() -> Vocabulary:
    """The vocabulary of the schema that mtj_loader includes."""
    path = included_file("schema.json")
    assert path is not None  # as much a part of the package as its modules
    schema: Any = json.loads(path.read_text())
    keys, definitions = schema["properties"], schema["$defs"]
    configs = keys["mtj_config_map"]
    transforms = [
        (form["const"], False) if "const" in form else (form["properties"]["op"]["const"], True)
        for form in definitions["transform"]["oneOf"]
    ]
    static, layer = (
        re.compile(definitions[name]["properties"]["module"]["pattern"])
        for name in ("static_target", "layer_target")
    )
    return Vocabulary(
        families=tuple(keys["mtj_compat"]["enum"]),
        positions=tuple(keys["mtj_pe"]["enum"]),
        config_keys=tuple(configs["properties"]),
        required_config_keys=tuple(configs["required"]),
        params=tuple(definitions["param"]["enum"]),
        static_module=static,
        layer_module=layer,
        transforms=dict(transforms),
    )


def included_file(name: str) -> Path | None:
    """A file among the maps that mtj_loader includes, None if there is none of this name."""
    return next((folder / name for folder in _FOLDERS if (folder / name).is_file()), None)
