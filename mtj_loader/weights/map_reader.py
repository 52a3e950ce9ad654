"""Finds, reads and checks weight maps. What `configs/schema.json` does not allow is an error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mtj_loader.errors import FormatError, MapError, StorageError
from mtj_loader.formats import strict_json
from mtj_loader.formats.typed_reader import TypedReader, format_value
from mtj_loader.storage.base import read_file
from mtj_loader.weights.map_schema import included_file, vocabulary
from mtj_loader.weights.merging import NO_CONVERSIONS, Conversions, Merge, Rename
from mtj_loader.weights.weight_map import ConfigRule, Target, Targets, WeightMap

_MAX_FILE_BYTES = 1 << 20  # fifty times the largest map
_MODEL_TYPE = re.compile(r"[a-z0-9_]{1,50}")  # becomes a part of a path


def find_map(model_type: str, path: Path | None = None) -> WeightMap:
    """Reads the map at `path`, or the one that mtj_loader includes for this model type.

    Raises:
      MapError: there is no map, or it is malformed.
      FormatError: it is not strict JSON.
    """
    if path is not None:
        return read_map(path)
    name = f"{model_type}.json"
    if _MODEL_TYPE.fullmatch(model_type) and (included := included_file(name)) is not None:
        return read_map(included)
    raise MapError("there is no weight map for this family", key="model_type", found=model_type)


def read_map(path: Path) -> WeightMap:
    """Reads and checks a map file.

    Raises:
      MapError: the file cannot be read, or contains something that the schema does not allow.
      FormatError: it is not strict JSON.
    """
    try:
        data = read_file(path, _MAX_FILE_BYTES)
    except (FormatError, StorageError) as error:
        what, found = "cannot read the weight map", error.found or error.what
        raise MapError(what, file=path, expected=error.expected, found=found) from error
    return parse_map(strict_json.parse_object(data, file=str(path)), file=str(path))


def parse_map(raw: Mapping[str, object], *, file: str) -> WeightMap:
    """Checks the parsed JSON of a map; see `read_map`."""
    reader = _MapReader(raw, file)
    reader.check_schema_key()
    known = vocabulary()
    weight_map = WeightMap(
        file=file,
        compat=reader.choice("mtj_compat", known.families),
        positions=reader.choice("mtj_pe", known.positions),
        config_rules=reader.section("mtj_config_map", required=True).rules(),
        static=reader.entries("static_weights", layered=False),
        layer=reader.entries("layer_weights", layered=True),
        zero_weights=tuple(item.zero() for item in reader.sections("zero_weights")),
        conversions=reader.conversions(),
    )
    reader.refuse_rest()
    return weight_map


class _MapReader(TypedReader):
    """Typed access to one object of the map's JSON; raises MapError."""

    error_class = MapError
    null_is_absent = False

    def check_schema_key(self) -> None:
        """`$schema` is for editors, and otherwise ignored."""
        if not isinstance(self.raw("$schema", ""), str):
            raise self.error("not a legal value", "$schema", "a string")

    def rules(self) -> dict[str, ConfigRule]:
        known = vocabulary()
        if unknown := [key for key in self.all_keys if key not in known.config_keys]:
            raise self.error("unknown key", unknown[0], ", ".join(known.config_keys))
        keys = dict.fromkeys((*known.required_config_keys, *self.all_keys))
        return {key: self.rule(key) for key in keys}

    def rule(self, key: str) -> ConfigRule:
        value = self.raw(key)
        if isinstance(value, str) and value:
            return ConfigRule((value,))
        if not isinstance(value, list) or len(value) < 2:
            raise self.error("a config rule is a key, or a list of keys and a default", key)
        *keys, default = value
        if not all(isinstance(k, str) and k for k in keys):
            raise self.error("the keys of a config rule are strings", key)
        if isinstance(default, dict | list):
            raise self.error("the default of a config rule is one value", key)
        return ConfigRule(tuple(keys), default, has_default=True)

    def entries(self, key: str, *, layered: bool) -> dict[str, Targets]:
        """Every tensor of a table with its targets."""
        table = self.section(key, required=True)
        for name in table.all_keys:
            table.check_placeholders(name, name, layered)
        return {name: table.section(name).targets(layered) for name in table.all_keys}

    def targets(self, layered: bool) -> Targets:
        """The targets of one entry: `{}`, `{"mtj": …}` or `{"split_rows": […]}`."""
        if not self.all_keys:
            return ()
        kind = "split_rows" if "split_rows" in self.all_keys else "mtj"
        self.raw(kind)
        self.refuse_rest()
        if kind == "mtj":
            return (self.section("mtj", required=True).target(layered),)
        targets = tuple(item.target(layered) for item in self.sections("split_rows"))
        if len(targets) < 2:
            raise self.error("a tensor is split into at least two parameters", "split_rows")
        return targets

    def target(self, layered: bool) -> Target:
        known, module = vocabulary(), self.text("module")
        pattern = known.layer_module if layered else known.static_module
        if not pattern.fullmatch(module):
            raise self.error("not a module path", "module", pattern.pattern)
        target = Target(module, self.choice("param", known.params), self.transforms())
        self.refuse_rest()
        return target

    def transforms(self) -> frozenset[str]:
        known = vocabulary().transforms
        legal = {name: {"op": name} if as_object else name for name, as_object in known.items()}
        items = self.items("transforms")
        if any(item not in legal.values() for item in items):
            names = ", ".join(format_value(form) for form in legal.values())
            raise self.error("unknown transform", "transforms", names)
        found = frozenset(name for name, form in legal.items() if form in items)
        if len(found) != len(items):
            raise self.error("a transform is listed twice", "transforms")
        return found

    def zero(self) -> Target:
        target = Target(self.text("module"), self.choice("param", vocabulary().params))
        self.refuse_rest()
        return target

    def conversions(self) -> Conversions:
        conversions = [item.conversion() for item in self.sections("conversions")]
        if not {"conversions", "layer_prefix"} & {*self.all_keys}:
            return NO_CONVERSIONS
        prefix = self.text("layer_prefix")
        self.check_placeholders("layer_prefix", prefix, layered=True)
        renames = tuple(item for item in conversions if isinstance(item, Rename))
        merges = tuple(item for item in conversions if isinstance(item, Merge))
        return Conversions(prefix, renames, merges)

    def conversion(self) -> Rename | Merge:
        if "rename" in self.all_keys:
            conversion = Rename(self.text("rename"), self.text("to"))
        else:
            sources = self.names("source_patterns")
            if not sources or not all(source.count("*") == 1 for source in sources):
                raise self.error("source patterns are names with one *", "source_patterns")
            axes = self.merge_axes(len(sources))
            conversion = Merge(sources, self.text("target_patterns"), *axes)
        self.refuse_rest()
        return conversion

    def merge_axes(self, patterns: int) -> tuple[int, int | None]:
        """The axes of merge_modulelist, and of concatenate if there are several patterns."""
        operations = ["merge_modulelist", "concatenate"][: 1 if patterns == 1 else 2]
        items = self.items("operations")
        found = map(_dim, items, operations)
        dims = [dim for dim in found if dim is not None]
        if not len(dims) == len(items) == len(operations):
            expected = " then ".join(f'{{"{name}": {{"dim": N}}}}' for name in operations)
            raise self.error("the operations do not fit their sources", "operations", expected)
        return dims[0], dims[1] if patterns > 1 else None

    def check_placeholders(self, key: str, text: str, layered: bool) -> None:
        """Names in layers have `{layer}` once; others have no placeholder."""
        rest = text.replace("{layer}", "", 1) if layered else text
        if not text or (layered and rest == text) or "{" in rest or "}" in rest:
            expected = "{layer} once" if layered else "a name without placeholders"
            raise self.error(f"the placeholders of {text!r} do not fit", key, expected)


def _dim(item: object, name: str) -> int | None:
    """The axis of `{name: {"dim": axis}}`; None if the item is anything else."""
    inner = item.get(name) if isinstance(item, dict) and item.keys() == {name} else None
    dim = inner.get("dim") if isinstance(inner, dict) and inner.keys() == {"dim"} else None
    return dim if isinstance(dim, int) and not isinstance(dim, bool) and 0 <= dim < 8 else None
