"""Leaves settings out of config.json, by the keys that messages about it name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import getitem
from typing import Any

from mtj_loader.errors import UsageError
from mtj_loader.formats.hf_config import rope_spellings
from mtj_loader.formats.typed_reader import shorten


def leave_out(config: Mapping[str, object], keys: Sequence[str], *, file: str) -> dict[str, object]:
    """The config without some keys; a key of a section has a path, such as `rope_scaling.type`.

    A key may be any spelling of a rotary setting. Other spellings go too, unless their value
    differs from that of the first one found.

    Raises:
      UsageError: the config has no such key.
    """
    result: dict[str, Any] = dict(config)
    for key in keys:
        names = (key, *rope_spellings(config, key))
        paths = dict.fromkeys(path for name in names if (path := _find(result, name)))
        values = {path: reduce(getitem, path, result) for path in paths}
        if not values:
            what = "ignore_settings names a setting that config.json does not have"
            raise UsageError(what, file=file, key=shorten(key))
        first = next(iter(values.values()))
        for path, value in values.items():
            if value == first:
                result = _without(result, path)
    return result


def _find(config: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    """The keys that lead to a setting; None without it. Keys may contain dots, too."""
    if name in config:
        return (name,)
    section, dot, rest = name.partition(".")
    inner = config.get(section)
    found = _find(inner, rest) if dot and isinstance(inner, Mapping) else None
    return found and (section, *found)


def _without(config: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """A copy without the setting at a path."""
    key, *rest = path
    if rest:
        return {**config, key: _without(config[key], rest)}
    return {name: value for name, value in config.items() if name != key}
