"""LoRA adapters as PEFT writes them: adapter_config.json and the tensors beside it.

Everything that would change the result and is not supported here is refused by name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mtj_loader.errors import AdapterError
from mtj_loader.formats import safetensors, torch_zip
from mtj_loader.formats.file_names import SUFFIX
from mtj_loader.formats.records import TensorRecord
from mtj_loader.formats.strict_json import read_object
from mtj_loader.lora import patterns
from mtj_loader.storage.base import FileVersion, Storage
from mtj_loader.storage.local import LocalStorage
from mtj_loader.storage.urls import is_url, open_url

T = TypeVar("T")
PathLike = str | os.PathLike[str]

CONFIG_FILE = "adapter_config.json"
_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_MAX_ALPHA = 1e30  # beyond, the scale leaves float32
_MAX_CONFIG_BYTES = 1 << 20  # a thousand times a usual one

# Where training began; these leave the base weights as they were (PEFT's LoraConfig).
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica", None)

# Settings that say how the adapter was made or found its modules, not what it computes.
_HARMLESS = frozenset({
    "alora_invocation_string", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform",
    "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type",
})  # fmt: skip

_READ = frozenset({
    "alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "peft_type", "r",
    "rank_pattern", "target_parameters", "use_rslora",
})  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's config says of its numbers.

    Attributes:
      rank: r, where no pattern says otherwise.
      alpha: the numerator of the scale, likewise.
      rank_pattern, alpha_pattern: regular expressions of module names; the first that fits wins.
      rslora: the scale is alpha / sqrt(r) instead of alpha / r (Kalajdzievski, 2023).
      target_parameters: names of parameters, instead of modules, that are adapted.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    target_parameters: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its name as the adapter writes it."""
        return _first_match(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of a module's product."""
        rank, alpha = self.rank_of(module), _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


@dataclass(frozen=True)
class Adapter:
    """An adapter whose headers were read and whose tensors were not.

    Attributes:
      location: its folder.
      storage: its files.
      config: see AdapterConfig.
      records: its tensors.
      stamp: the file that they are in.
    """

    location: str
    storage: Storage
    config: AdapterConfig
    records: Mapping[str, TensorRecord]
    stamp: FileVersion


def open_adapter(path: PathLike) -> Adapter:
    """Opens an adapter's folder, on this machine or at a URL.

    Raises:
      AdapterError: it is no LoRA adapter, or one that does something unsupported.
      CheckpointError: its files are damaged.
    """
    if is_url(path):
        storage, _ = open_url(str(path), file_suffix=SUFFIX)
        folder = storage.location
    else:
        storage, folder = LocalStorage(Path(path)), str(path)
    with storage:
        there = storage.prepare([CONFIG_FILE, *_WEIGHT_FILES])
        if CONFIG_FILE not in there:
            raise AdapterError("not an adapter's folder", file=folder, expected=CONFIG_FILE)
        config = read_object(storage, CONFIG_FILE, _MAX_CONFIG_BYTES)
        checked = read_config(config, file=f"{folder}/{CONFIG_FILE}")
        stamp = next((there[name] for name in _WEIGHT_FILES if name in there), None)
        if stamp is None:
            expected = " or ".join(_WEIGHT_FILES)
            raise AdapterError("the adapter has no weights", file=folder, expected=expected)
        records = {record.name: record for record in _read_records(storage, stamp)}
    return Adapter(folder, storage, checked, records, stamp)


def _read_records(storage: Storage, stamp: FileVersion) -> list[TensorRecord]:
    if stamp.path.endswith(".safetensors"):
        return safetensors.read_records(storage, stamp)
    return torch_zip.read_records(storage, stamp)


def read_config(config: Mapping[str, object], *, file: str) -> AdapterConfig:
    """Checks adapter_config.json.

    Raises:
      AdapterError: a setting that is malformed, unknown or not supported.
    """
    read = _Reader(config, file)
    read.refuse_what_is_not_lora()
    return AdapterConfig(
        rank=read.rank(config.get("r", 8), "r"),
        alpha=read.alpha(config.get("lora_alpha", 8), "lora_alpha"),
        rank_pattern={k: read.rank(v, k) for k, v in read.table("rank_pattern").items()},
        alpha_pattern={k: read.alpha(v, k) for k, v in read.table("alpha_pattern").items()},
        rslora=read.flag("use_rslora"),
        target_parameters=read.names("target_parameters"),
    )


@dataclass(frozen=True)
class _Reader:
    """Typed access to the config; every failure names the file and the key."""

    config: Mapping[str, object]
    file: str

    def refuse_what_is_not_lora(self) -> None:
        if self.config.get("peft_type") != "LORA":
            raise self.error("not a LoRA adapter", "peft_type", "LORA")
        if self.config.get("bias", "none") != "none":
            raise self.error("adapters that train biases are not supported", "bias", "none")
        if self.config.get("init_lora_weights") not in _PLAIN_STARTS:
            what = "this start changed the base weights; convert the adapter with PEFT first"
            raise self.error(what, "init_lora_weights", "true")
        # In linear layers PEFT drops this setting with a warning; embeddings need none.
        self.flag("fan_in_fan_out")
        for key, value in self.config.items():
            if key not in _READ | _HARMLESS and value not in (None, False, {}, []):
                raise self.error("this setting of an adapter is not supported", key, "null")

    def rank(self, value: object, key: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error("a rank is a positive integer", key, "1 or more", value)
        return value

    def alpha(self, value: object, key: str) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error("alpha is a number", key, "a number", value)
        if not -_MAX_ALPHA < value < _MAX_ALPHA:
            raise self.error("alpha is a number of usual size", key, f"below {_MAX_ALPHA}", value)
        return float(value)

    def table(self, key: str) -> dict[str, object]:
        value = self.config.get(key) or {}
        if not isinstance(value, dict):
            raise self.error("patterns are an object", key, "an object")
        for pattern in value:
            try:
                patterns.compile_pattern(pattern)  # whose errors count its own characters
                patterns.compile_pattern(_whole(pattern))
            except patterns.UnsupportedPatternError as error:
                what = f"not a regular expression that is understood here: {error}"
                raise self.error(what, key, None, pattern[:99]) from error
        return value

    def flag(self, key: str) -> bool:
        value = self.config.get(key, False)
        if not isinstance(value, bool):
            raise self.error("a truth value is needed", key, "true or false")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        value = self.config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.error("names are needed", key, "a list of names")
        return tuple(value)

    def error(
        self, what: str, key: str, expected: str | None, found: object = None
    ) -> AdapterError:
        value = self.config.get(key) if found is None else found
        return AdapterError(what, file=self.file, key=key, expected=expected, found=repr(value))


def _first_match(table: Mapping[str, T], module: str, default: T) -> T:
    for pattern, value in table.items():
        if patterns.matches(_whole(pattern), module):
            return value
    return default


def _whole(pattern: str) -> str:
    """A pattern as PEFT's get_pattern_key applies it."""
    return rf"(.*\.)?({pattern})"
