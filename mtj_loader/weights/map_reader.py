"""Reading a weight map: its JSON, checked word by word against the documented vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mtj_loader.errors import MapError
from mtj_loader.formats import strict_json
from mtj_loader.weights.merging import NO_CONVERSIONS, Conversions, Merge, Rename
from mtj_loader.weights.transforms import TRANSFORMS
from mtj_loader.weights.weight_map import ConfigRule, Target, WeightMap


def read_map(path: Path) -> WeightMap:
    """Reads and checks a map file.

    Raises:
      MapError: the file cannot be read, or says something outside the documented vocabulary.
      FormatError: it is not strict JSON.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MapError("cannot read the weight map", file=path, found=error.strerror) from error
    return parse_map(strict_json.parse_object(data, file=str(path)), file=str(path))


def parse_map(raw: Mapping[str, object], *, file: str) -> WeightMap:
    """Checks the parsed JSON of a map; see `read_map`."""
    read = _Reader(file)
    read.only(raw, "the map", _TOP_KEYS)
    rules = read.table(raw, "mtj_config_map")
    static = read.table(raw, "static_weights")
    layer = read.table(raw, "layer_weights")
    return WeightMap(
        file=file,
        compat=read.text(raw, "mtj_compat"),
        positions=read.text(raw, "mtj_pe"),
        config_rules={key: read.rule(key, rule) for key, rule in rules.items()},
        static={name: read.entry(name, entry, layered=False) for name, entry in static.items()},
        layer={name: read.entry(name, entry, layered=True) for name, entry in layer.items()},
        zero_weights=tuple(read.zero(item) for item in read.items(raw, "zero_weights")),
        conversions=read.conversions(raw),
    )


_TOP_KEYS = (
    "$schema", "mtj_compat", "mtj_pe", "mtj_config_map", "static_weights", "layer_weights",
    "zero_weights", "layer_prefix", "conversions",
)  # fmt: skip


@dataclass(frozen=True)
class _Reader:
    """Typed access to the map's JSON; every failure is a MapError that names the file and key."""

    file: str

    def only(self, raw: Mapping[str, object], where: str, allowed: Sequence[str]) -> None:
        for key in raw:
            if key not in allowed:
                self.fail(f"{where} has an unknown key", key, ", ".join(allowed), key)

    def text(self, raw: Mapping[str, object], key: str) -> str:
        value = raw.get(key)
        if not isinstance(value, str) or not value:
            self.fail("a text is needed", key, "a non-empty string", value)
        return value

    def table(self, raw: Mapping[str, object], key: str) -> dict[str, object]:
        value = raw.get(key)
        if not isinstance(value, dict):
            self.fail("a table is needed", key, "an object", value)
        return value

    def rule(self, key: str, value: object) -> ConfigRule:
        if isinstance(value, str):
            return ConfigRule((value,))
        if not isinstance(value, list) or len(value) < 2:
            self.fail("a config rule is a key, or a list of keys and a default", key, None, value)
        *keys, default = value
        if not all(isinstance(k, str) for k in keys):
            self.fail("a config rule's keys are strings", key, None, value)
        return ConfigRule(tuple(keys), default, has_default=True)

    def entry(self, name: str, value: object, *, layered: bool) -> Target | None:
        if not isinstance(value, dict):
            self.fail("an entry is an object", name, "an object", value)
        if not value:
            self.check_layer(name, [name], layered)
            return None
        self.only(value, f"the entry of {name}", ("mtj",))
        mtj = self.table(value, "mtj")
        self.only(mtj, f"the entry of {name}", ("module", "param", "transforms"))
        target = Target(self.text(mtj, "module"), self.text(mtj, "param"), self.ops(name, mtj))
        self.check_layer(name, [name, target.module], layered)
        return target

    def ops(self, name: str, mtj: Mapping[str, object]) -> frozenset[str]:
        listed: list[str] = []
        for item in self.items(mtj, "transforms"):
            op = _op(item)
            if not isinstance(op, str) or op not in TRANSFORMS:
                self.fail("unknown transform", name, ", ".join(TRANSFORMS), op)
            listed.append(op)
        if len(set(listed)) != len(listed):
            self.fail("a transform is listed twice", name, None, listed)
        return frozenset(listed)

    def items(self, raw: Mapping[str, object], key: str) -> list[object]:
        value = raw.get(key, [])
        if not isinstance(value, list):
            self.fail("a list is needed", key, "a list", value)
        return value

    def zero(self, item: object) -> Target:
        if not isinstance(item, dict):
            self.fail("an entry is an object", "zero_weights", "an object", item)
        self.only(item, "zero_weights", ("module", "param"))
        return Target(self.text(item, "module"), self.text(item, "param"), frozenset())

    def conversions(self, raw: Mapping[str, object]) -> Conversions:
        listed = self.items(raw, "conversions")
        if not listed:
            return NO_CONVERSIONS
        prefix = self.text(raw, "layer_prefix")
        self.check_layer("layer_prefix", [prefix], layered=True)
        read = [self.conversion(item) for item in listed]
        renames = tuple(item for item in read if isinstance(item, Rename))
        return Conversions(prefix, renames, tuple(m for m in read if isinstance(m, Merge)))

    def conversion(self, item: object) -> Rename | Merge:
        if not isinstance(item, dict):
            self.fail("a conversion is an object", "conversions", "an object", item)
        if "rename" in item:
            self.only(item, "a rename", ("rename", "to"))
            return Rename(self.text(item, "rename"), self.text(item, "to"))
        self.only(item, "a conversion", ("source_patterns", "target_patterns", "operations"))
        sources = self.items(item, "source_patterns")
        if not sources or not all(isinstance(s, str) and s.count("*") == 1 for s in sources):
            self.fail("source patterns are names with one *", "source_patterns", None, sources)
        stack_axis, concat_axis = self.operations(self.items(item, "operations"), len(sources))
        target = self.text(item, "target_patterns")
        return Merge(tuple(map(str, sources)), target, stack_axis, concat_axis)

    def operations(self, listed: Sequence[object], patterns: int) -> tuple[int, int | None]:
        """The axes of merge_modulelist, and of concatenate where there is something to join."""
        wanted = ["merge_modulelist", "concatenate"][: 1 if patterns == 1 else 2]
        dims = [_dim(item, name) for item, name in zip(listed, wanted, strict=False)]
        if len(listed) != len(wanted) or None in dims:
            expected = " then ".join(f'{{"{name}": {{"dim": N}}}}' for name in wanted)
            self.fail("the operations do not fit their sources", "operations", expected, listed)
        return dims[0] or 0, dims[1] if patterns > 1 else None

    def check_layer(self, name: str, texts: Sequence[str], layered: bool) -> None:
        """Static names have no placeholder; layer names, and their modules, have `{layer}` once."""
        for text in texts:
            rest = text.replace("{layer}", "", 1) if layered else text
            if (layered and rest == text) or "{" in rest or "}" in rest:
                wanted = "{layer} once" if layered else "no placeholder"
                self.fail("placeholders do not fit", name, wanted, text)

    def fail(self, what: str, key: str, expected: object, found: object) -> NoReturn:
        raise MapError(what, file=self.file, key=key, expected=expected, found=repr(found))


def _op(item: object) -> object:
    """A transform's name, which may be written as an object: `{"op": name}`."""
    return item["op"] if isinstance(item, dict) and item.keys() == {"op"} else item


def _dim(item: object, name: str) -> int | None:
    """The axis of `{name: {"dim": axis}}`; None if the item is something else."""
    inner = item.get(name) if isinstance(item, dict) and item.keys() == {name} else None
    dim = inner.get("dim") if isinstance(inner, dict) and inner.keys() == {"dim"} else None
    return dim if isinstance(dim, int) and not isinstance(dim, bool) and 0 <= dim < 8 else None
