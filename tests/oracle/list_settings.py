"""Lists the keys of config.json that transformers reads, for every family. Needs `parity`.

    python -m tests.oracle.list_settings

writes mtj_loader/formats/transformers_settings.json from the source of the installed transformers.
A key counts as read if the family's configuration class has it, or if the code that is reachable
from its model class gets it from a config. That is more than what changes the logits, never less.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from transformers import modeling_rope_utils
from transformers.configuration_utils import ALLOWED_ATTN_LAYER_TYPES, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

FILE = Path(__file__).parents[2] / "mtj_loader" / "formats" / "transformers_settings.json"
MODEL_TYPES = (
    "bloom", "gemma2", "gemma3_text", "gpt_neo", "gpt_neox", "gptj", "llama", "mistral", "mixtral",
    "mpt", "opt", "phi3", "qwen2", "qwen3", "stablelm", "xglm",
)  # fmt: skip

# Modules shared by all families in which references are followed.
_SHARED = {
    f"transformers.{name}"
    for name in (
        "cache_utils", "configuration_utils", "integrations.heterogeneity.configuration_utils",
        "integrations.sdpa_attention", "masking_utils", "modeling_layers", "modeling_rope_utils",
        "modeling_utils",
    )
}  # fmt: skip
_CONFIG_NAMES = {"config", "decoder_config", "effective_config", "layer_config", "text_config"}
# The rope mixin takes these from the top level, unless a family's `convert_rope_params_to_dict` has
# already filled them in under another name.
_OLD_ROPE_KEYS = {"rope_theta", "partial_rotary_factor"}
_ROPE_SECTIONS = {
    "rope_parameters",
    "rope_scaling",
}  # PreTrainedConfig looks for them in any config
# Methods of a config that load, save or check it, and those that `dataclass` makes.
_UNUSED_METHODS = ("_upload", "dict_", "from_", "get_config", "push_", "save_", "to_", "validate")

Definition = ast.ClassDef | ast.FunctionDef


def settings() -> dict[str, Any]:
    """The content of the file."""
    rope = {"default": _default_rope_keys()}
    for rope_type, function in modeling_rope_utils.ROPE_INIT_FUNCTIONS.items():
        rope[rope_type] = rope["default"] | _rope_keys(_parse(function))
    return {
        "transformers_version": transformers.__version__,
        "families": {name: sorted(_keys_of_family(name)) for name in MODEL_TYPES},
        "rope": {name: sorted(keys) for name, keys in rope.items()},
    }


def _keys_of_family(model_type: str) -> set[str]:
    config_class = CONFIG_MAPPING[model_type]
    keys = _keys_of_config(config_class)
    for node in _reachable(MODEL_FOR_CAUSAL_LM_MAPPING[config_class]):
        keys |= set(_keys_from_configs(node))
    keys = {key for key in keys if not _is_method(config_class, key)}
    for name, sub_config in config_class.sub_configs.items():
        own = {field.name for field in fields(sub_config)} - {
            field.name for field in fields(PreTrainedConfig)
        }
        keys |= {f"{name}.{key}" for key in own}
    return keys


def _keys_of_config(config_class: type[PreTrainedConfig]) -> set[str]:
    """Fields, aliases, and what the methods read; a method that is overridden does not count."""
    keys = {field.name for field in fields(config_class)}  # pyright: ignore[reportArgumentType]
    keys |= {*config_class.attribute_map, *config_class.attribute_map.values()}
    filled_in: set[str] = set()
    names = {name for base in config_class.__mro__ for name in vars(base)}
    for name in {n for n in names if n == "__post_init__" or not n.startswith("__")}:
        found = {key for node in _methods(config_class, name) for key in _keys_from_self(node)}
        keys |= found
        if name == "convert_rope_params_to_dict":
            texts = {n.value for node in _methods(config_class, name) for n in _constants(node)}
            filled_in = (_OLD_ROPE_KEYS & texts) - found
    if not hasattr(config_class, "rope_parameters"):
        return keys - _ROPE_SECTIONS - _OLD_ROPE_KEYS
    return keys - filled_in


def _constants(node: ast.AST) -> Iterator[ast.Constant]:
    return (part for part in ast.walk(node) if isinstance(part, ast.Constant))


def _methods(config_class: type, name: str) -> Iterator[ast.AST]:
    """The method that a config has by this name, and those that it calls with `super()`."""
    has_rope = hasattr(config_class, "rope_parameters")
    for base in config_class.__mro__:
        if base is modeling_rope_utils.RotaryEmbeddingConfigMixin and not has_rope:
            continue
        method = vars(base).get(name)
        method = getattr(method, "fget", method)  # of a property
        if not inspect.isfunction(method) or not method.__module__.startswith("transformers."):
            continue
        if name.startswith(_UNUSED_METHODS):
            continue
        node = _parse(method)
        yield node
        if "super()" not in ast.unparse(node):
            return


def _reachable(root: type) -> Iterator[Definition]:
    """The definition of a class, and those that it refers to, in its module and in _SHARED."""
    waiting, seen = [(root.__module__, root.__name__)], set()
    while waiting:
        module, name = waiting.pop()
        if (module, name) in seen:
            continue
        seen.add((module, name))
        definitions, imports = _names_of(module)
        if name in imports:
            waiting.append(imports[name])
        elif name in definitions:
            node = definitions[name]
            yield node
            used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            waiting += [(module, other) for other in used if other in definitions]
            waiting += [imports[other] for other in used if other in imports]


@functools.cache
def _names_of(module_name: str) -> tuple[dict[str, Definition], dict[str, tuple[str, str]]]:
    """Top-level definitions, and names imported from shared modules with their origin."""
    module = importlib.import_module(module_name)
    tree = ast.parse(inspect.getsource(module))
    definitions = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    imports = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            origin = _origin(node, module)
            if origin in _SHARED:
                imports |= {a.asname or a.name: (origin, a.name) for a in node.names}
    return definitions, imports


def _origin(node: ast.ImportFrom, module: ModuleType) -> str:
    package = module.__package__ or ""
    base = package.rsplit(".", node.level - 1)[0] if node.level else ""
    return ".".join(part for part in (base, node.module) if part)


def _keys_from_configs(node: ast.AST) -> Iterator[str]:
    """`config.KEY`, `self.config.KEY`, `config.get_text_config().KEY`, `getattr(config, "KEY")`."""
    yield from _attributes(node, _is_config)


def _keys_from_self(node: ast.AST) -> Iterator[str]:
    """What a method of a config reads of itself and of the keys that it is given."""
    yield from _attributes(node, lambda n: isinstance(n, ast.Name) and n.id in {"self", "config"})
    for part in ast.walk(node):
        match part:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="kwargs"), attr="pop" | "get"),
                args=[ast.Constant(value=str(key)), *_],
            ):
                yield key
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Tuple() as keys) if (
                name.endswith("config_names")  # get_text_config tries these
            ):
                yield from ast.literal_eval(keys)


def _attributes(node: ast.AST, is_config: Any) -> Iterator[str]:
    for part in ast.walk(node):
        match part:
            case ast.Attribute(value=value, attr=key, ctx=ast.Load()) if is_config(value):
                yield key
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr"),
                args=[value, ast.Constant(value=str(key)), *_],
            ) if is_config(value):
                yield key


def _is_config(node: ast.AST) -> bool:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name in _CONFIG_NAMES
        case ast.Call(func=ast.Attribute(attr="get_text_config")):
            return True
    return False


def _is_method(config_class: type, key: str) -> bool:
    return key.startswith("__") or callable(getattr(config_class, key, None))


def _default_rope_keys() -> set[str]:
    """Keys of a rope section that are read whatever its type; a nested section is per layer."""
    keys = {"rope_type", "type", *ALLOWED_ATTN_LAYER_TYPES}
    for model_type in MODEL_TYPES:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
        module = sys.modules[model_class.__module__]
        keys |= _rope_keys(ast.parse(inspect.getsource(module)))
    return keys


def _rope_keys(node: ast.AST) -> set[str]:
    """`….rope_parameters["KEY"]`, `rope_parameters_dict.get("KEY")` and the like."""
    keys: set[str] = set()
    for part in ast.walk(node):
        match part:
            case ast.Subscript(value=value, slice=ast.Constant(value=str(key))):
                keys |= {key} if "rope_parameters" in ast.unparse(value) else set()
            case ast.Call(
                func=ast.Attribute(value=value, attr="get"),
                args=[ast.Constant(value=str(key)), *_],
            ):
                keys |= {key} if "rope_parameters" in ast.unparse(value) else set()
    return keys


def _parse(function: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))


def as_text(found: dict[str, Any]) -> str:
    """JSON with one list per line."""
    version = json.dumps(found["transformers_version"])
    parts = [f'  "transformers_version": {version}']
    for part in ("families", "rope"):
        lists = [
            f"    {json.dumps(name)}: {json.dumps(keys)}" for name, keys in found[part].items()
        ]
        parts.append(f'  "{part}": {{\n' + ",\n".join(lists) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Writes the file."""
    FILE.write_text(as_text(settings()))


if __name__ == "__main__":
    main()
