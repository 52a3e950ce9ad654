"""Finds, reads and checks weight maps. Anything outside the documented vocabulary is an error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mtj_loader.errors import MapError
from mtj_loader.formats import strict_json
from mtj_loader.formats.typed_reader import TypedReader
from mtj_loader.weights.merging import NO_CONVERSIONS, Conversions, Merge, Rename
from mtj_loader.weights.transforms import TRANSFORMS
from mtj_loader.weights.weight_map import ConfigRule, Target, Targets, WeightMap

_PACKAGE = Path(__file__).resolve().parent.parent
# In a wheel the maps are inside the package; in a checkout they are beside it.
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def find_map(model_type: str, path: Path | None = None) -> WeightMap:
    """Reads the map at `path`, or the one that mtj_loader includes for this model type.

    Raises:
      MapError: there is no map, or it is malformed.
      FormatError: it is not strict JSON.
    """
    if path is not None:
        return read_map(path)
    for folder in _FOLDERS:
        if (folder / f"{model_type}.json").is_file():
            return read_map(folder / f"{model_type}.json")
    raise MapError("there is no weight map for this family", key="model_type", found=model_type)


def read_map(path: Path) -> WeightMap:
    """Reads and checks a map file.

    Raises:
      MapError: the file cannot be read, or contains something outside the documented vocabulary.
      FormatError: it is not strict JSON.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MapError("cannot read the weight map", file=path, found=error.strerror) from error
    return parse_map(strict_json.parse_object(data, file=str(path)), file=str(path))


def parse_map(raw: Mapping[str, object], *, file: str) -> WeightMap:
    """Checks the parsed JSON of a map; see `read_map`."""
    reader = _MapReader(raw, file)
    reader.raw("$schema")  # for editors
    rules = reader.section("mtj_config_map", required=True)
    weight_map = WeightMap(
        file=file,
        compat=reader.text("mtj_compat"),
        positions=reader.text("mtj_pe"),
        config_rules={key: rules.rule(key) for key in rules.all_keys},
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

    def rule(self, key: str) -> ConfigRule:
        value = self.raw(key)
        if isinstance(value, str):
            return ConfigRule((value,))
        if not isinstance(value, list) or len(value) < 2:
            raise self.error("a config rule is a key, or a list of keys and a default", key)
        *keys, default = value
        if not all(isinstance(k, str) for k in keys):
            raise self.error("the keys of a config rule are strings", key)
        return ConfigRule(tuple(keys), default, has_default=True)

    def entries(self, key: str, *, layered: bool) -> dict[str, Targets]:
        """Every tensor of a table with its targets."""
        table = self.section(key, required=True)
        found = {name: table.section(name).targets() for name in table.all_keys}
        for name, targets in found.items():
            for text in (name, *(target.module for target in targets)):
                table.check_placeholders(name, text, layered)
        return found

    def targets(self) -> Targets:
        """The targets of one entry: `{}`, `{"mtj": …}` or `{"split_rows": […]}`."""
        if not self.all_keys:
            return ()
        kind = "split_rows" if "split_rows" in self.all_keys else "mtj"
        self.raw(kind)
        self.refuse_rest()
        if kind == "mtj":
            return (self.section("mtj", required=True).target(),)
        targets = tuple(item.target() for item in self.sections("split_rows"))
        if len(targets) < 2:
            raise self.error("a tensor is split into at least two parameters", "split_rows")
        return targets

    def target(self) -> Target:
        target = Target(self.text("module"), self.text("param"), self.transforms())
        self.refuse_rest()
        return target

    def transforms(self) -> frozenset[str]:
        names = [_transform_name(item) for item in self.items("transforms")]
        known = [name for name in TRANSFORMS if name in names]
        if any(name not in TRANSFORMS for name in names):
            raise self.error("unknown transform", "transforms", ", ".join(TRANSFORMS))
        if len(known) != len(names):
            raise self.error("a transform is listed twice", "transforms")
        return frozenset(known)

    def zero(self) -> Target:
        target = Target(self.text("module"), self.text("param"))
        self.refuse_rest()
        return target

    def conversions(self) -> Conversions:
        self.raw("layer_prefix")  # allowed without conversions
        conversions = [item.conversion() for item in self.sections("conversions")]
        if not conversions:
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
        dims = [_dim(item, name) for item, name in zip(items, operations, strict=False)]
        if len(items) != len(operations) or None in dims:
            expected = " then ".join(f'{{"{name}": {{"dim": N}}}}' for name in operations)
            raise self.error("the operations do not fit their sources", "operations", expected)
        return dims[0] or 0, dims[1] if patterns > 1 else None

    def check_placeholders(self, key: str, text: str, layered: bool) -> None:
        """Layer names and their modules have `{layer}` once; static ones have no placeholder."""
        rest = text.replace("{layer}", "", 1) if layered else text
        if (layered and rest == text) or "{" in rest or "}" in rest:
            expected = "{layer} once" if layered else "no placeholder"
            raise self.error(f"the placeholders of {text!r} do not fit", key, expected)


def _transform_name(item: object) -> object:
    """A transform's name, which may be written as an object: `{"op": name}`."""
    return item["op"] if isinstance(item, dict) and item.keys() == {"op"} else item


def _dim(item: object, name: str) -> int | None:
    """The axis of `{name: {"dim": axis}}`; None if the item is anything else."""
    inner = item.get(name) if isinstance(item, dict) and item.keys() == {name} else None
    dim = inner.get("dim") if isinstance(inner, dict) and inner.keys() == {"dim"} else None
    return dim if isinstance(dim, int) and not isinstance(dim, bool) and 0 <= dim < 8 else None
