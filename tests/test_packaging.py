"""The installed package matches the repository: version, command, dependencies, weight maps."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCHEMA = json.loads((ROOT / "configs/schema.json").read_text())
SEED = ROOT / "tests/data/seeds/gpt_neox.json"  # KoboldAI's map; do not edit it
MAPS = [SEED, *sorted(set(ROOT.glob("configs/*.json")) - {ROOT / "configs/schema.json"})]

NORM = "gpt_neox.final_layer_norm.weight"
QKV = "gpt_neox.layers.{layer}.attention.query_key_value.weight"


def test_installed_version_matches_pyproject():
    assert importlib.metadata.version("mtj-loader") == PROJECT["version"]


def test_command_is_installed():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="mtj-loader")
    assert callable(script.load())


def test_package_imports_only_its_core_dependencies():
    modules = {name.partition(">=")[0] for name in PROJECT["dependencies"]} - {"dm-haiku"}
    allowed = modules | {"haiku", "mtj_loader"} | sys.stdlib_module_names
    lazy = {"urls.py", "hub.py"}
    optional = lazy | {"object_store.py", "server_errors.py"}
    files = [file for file in (ROOT / "mtj_loader").rglob("*.py") if file.name not in optional]
    for file in (ROOT / "mtj_loader" / "grammar").glob("*.py"):  # tests/grammar: imported late
        files.remove(file)
        assert _imports(file) <= allowed | {"llguidance"}
    found = {name for file in files for name in _imports(file)}
    assert sorted(found - allowed) == []
    for name in optional:
        assert _imports(ROOT / "mtj_loader" / "storage" / name) <= allowed | {"obstore"}
    for name in lazy:  # these import the others, and obstore, when they need them
        file = ROOT / "mtj_loader" / "storage" / name
        assert "obstore" not in _imports(file, at_import=True)


def _imports(file: Path, *, at_import: bool = False) -> set[str]:
    """Top-level names of the modules that a file imports, anywhere or when it is imported."""
    tree = ast.parse(file.read_text())
    nodes = tree.body if at_import else list(ast.walk(tree))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    froms = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {str(name).partition(".")[0] for name in plain | froms}


def test_schema_is_a_valid_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("file", MAPS, ids=lambda file: str(file.relative_to(ROOT)))
def test_map_follows_the_schema(file: Path):
    jsonschema.validate(json.loads(file.read_text()), SCHEMA)


def _target(map_: dict) -> dict:
    return map_["layer_weights"][QKV]["mtj"]


def _split(map_: dict, parts: int, **changes: object) -> None:
    target = {**_target(map_), **changes}
    map_["layer_weights"][QKV] = {"split_rows": [target] * parts}


def test_a_split_of_rows_follows_the_schema():
    map_ = json.loads(SEED.read_text())
    _split(map_, 2)
    jsonschema.validate(map_, SCHEMA)


BAD_MAPS: dict[str, Callable[[dict], object]] = {
    "unknown top-level key": lambda m: m.update(extra={}),
    "no mtj_compat": lambda m: m.pop("mtj_compat"),
    "unknown family": lambda m: m.update(mtj_compat="gpt5"),
    "unknown positions": lambda m: m.update(mtj_pe="spiral"),
    "unknown configuration key": lambda m: m["mtj_config_map"].update(width="hidden_size"),
    "no number of layers": lambda m: m["mtj_config_map"].pop("layers"),
    "configuration key is a number": lambda m: m["mtj_config_map"].update(layers=6),
    "list without a default": lambda m: m["mtj_config_map"].update(layers=["num_layers"]),
    "list that starts with a number": lambda m: m["mtj_config_map"].update(layers=[6, 6]),
    "unknown key in an entry": lambda m: m["static_weights"][NORM].update(optional=True),
    "entry is null": lambda m: m["static_weights"].update({NORM: None}),
    "layer entry among the static ones": lambda m: m["static_weights"].update({QKV: {}}),
    "static entry among the layers": lambda m: m["layer_weights"].update({NORM: {}}),
    "unknown placeholder": lambda m: m["layer_weights"].update({"h.{layer}.{expert}": {}}),
    "no module": lambda m: _target(m).pop("module"),
    "module without {layer}": lambda m: _target(m).update(module="layer_0/~/combined_qkv"),
    "unknown param": lambda m: _target(m).update(param="weight"),
    "unknown key in a target": lambda m: _target(m).update(scale=2),
    "unknown transform": lambda m: _target(m).update(transforms=["transpose"]),
    "transform twice": lambda m: _target(m).update(transforms=["vocab_pad", "vocab_pad"]),
    "both a target and a split": lambda m: m["layer_weights"][QKV].update(split_rows=[]),
    "split into one": lambda m: _split(m, 1),
    "split into a static module": lambda m: _split(m, 2, module="projection_shard/~/linear"),
    "transforms not a list": lambda m: _target(m).update(transforms="vocab_pad"),
}


@pytest.mark.parametrize("damage", BAD_MAPS.values(), ids=BAD_MAPS)
def test_bad_map_violates_the_schema(damage: Callable[[dict], object]):
    map_ = json.loads(SEED.read_text())
    damage(map_)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(map_, SCHEMA)
