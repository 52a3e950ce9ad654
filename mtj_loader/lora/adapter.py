"""LoRA adapters as written by PEFT: adapter_config.json and the tensors beside it.

Every setting that would change the result and is not supported is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mtj_loader.errors import AdapterError
from mtj_loader.formats import safetensors, torch_zip
from mtj_loader.formats.file_names import SUFFIX
from mtj_loader.formats.records import TensorRecord
from mtj_loader.formats.strict_json import read_object
from mtj_loader.formats.typed_reader import TypedReader
from mtj_loader.lora.module_selection import ModuleNames, ModuleSelection
from mtj_loader.lora.pattern_table import PatternTable
from mtj_loader.lora.patterns import UnsupportedPatternError
from mtj_loader.options import PathLike
from mtj_loader.storage.base import FileVersion, Storage
from mtj_loader.storage.local import LocalStorage
from mtj_loader.storage.urls import is_url, open_url

T = TypeVar("T")

CONFIG_FILE = "adapter_config.json"
PATTERN_KEYS = ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules")
_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_MAX_ALPHA = 1e29  # keeps the scale well inside the range of float32
_MAX_PARAMETERS = 1_000  # each module is compared with each; models have a few per layer
_MAX_CONFIG_BYTES = 1 << 20  # a thousand times the usual size

# Initializations that do not change the base weights (PEFT's LoraConfig).
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica", None)

# Settings that PEFT writes as null if they are not used.
_NULLABLE = (
    "alpha_pattern", "exclude_modules", "layers_pattern", "layers_to_transform", "rank_pattern",
    "target_modules", "target_parameters",
)  # fmt: skip

# Settings of how the adapter was trained, not of what it computes.
_IGNORED = frozenset({
    "alora_invocation_string", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying",
    "eva_config", "inference_mode", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
})  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """The ranks and scales of an adapter.

    Attributes:
      rank: r, for modules that no pattern matches.
      alpha: the numerator of the scale, for modules that no pattern matches.
      rank_pattern, alpha_pattern: by regular expressions of module names; the first match wins.
      rslora: the scale is alpha / sqrt(r) instead of alpha / r (Kalajdzievski, 2023).
      modules: which modules are adapted.
      target_parameters: names of adapted parameters, instead of modules.
    """

    rank: int
    alpha: float
    rank_pattern: PatternTable[int]
    alpha_pattern: PatternTable[float]
    rslora: bool
    modules: ModuleSelection
    target_parameters: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its name in the adapter."""
        return self.rank_pattern.first_match(module, self.rank)

    def scale_of(self, module: str) -> float:
        """The factor that a module's product is multiplied by."""
        rank, alpha = self.rank_of(module), self.alpha_pattern.first_match(module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


@dataclass(frozen=True)
class Adapter:
    """An adapter of which only the headers have been read.

    Attributes:
      location: its folder.
      storage: its files.
      config: its ranks and scales.
      settings: adapter_config.json, which `config` was read from.
      records: its tensors, by name.
      file: the file that they are in.
    """

    location: str
    storage: Storage
    config: AdapterConfig
    settings: Mapping[str, object]
    records: Mapping[str, TensorRecord]
    file: FileVersion


def open_adapter(path: PathLike) -> Adapter:
    """Opens an adapter's folder, local or at a URL.

    Raises:
      AdapterError: it is not a LoRA adapter, or it has an unsupported setting.
      CheckpointError: its files are damaged.
    """
    if is_url(path):
        storage, _ = open_url(str(path), file_suffix=SUFFIX)
        folder = storage.location
    else:
        storage, folder = LocalStorage(Path(path)), str(path)
    with storage:
        versions = storage.prepare([CONFIG_FILE, *_WEIGHT_FILES])
        if CONFIG_FILE not in versions:
            raise AdapterError("not the folder of an adapter", file=folder, expected=CONFIG_FILE)
        settings = read_object(storage, CONFIG_FILE, _MAX_CONFIG_BYTES)
        config = read_config(settings, file=f"{folder}/{CONFIG_FILE}")
        file = next((versions[name] for name in _WEIGHT_FILES if name in versions), None)
        if file is None:
            expected = " or ".join(_WEIGHT_FILES)
            raise AdapterError("the adapter has no weights", file=folder, expected=expected)
        reader = safetensors if file.path.endswith(SUFFIX) else torch_zip
        records = {record.name: record for record in reader.read_records(storage, file)}
    return Adapter(folder, storage, config, settings, records, file)


def read_config(config: Mapping[str, object], *, file: str) -> AdapterConfig:
    """Checks adapter_config.json.

    Raises:
      AdapterError: a setting is malformed, unknown or not supported.
    """
    given = {k: v for k, v in config.items() if v is not None or k not in _NULLABLE}
    reader = _AdapterReader(given, file)
    reader.refuse_other_methods()
    checked = AdapterConfig(
        rank=reader.integer("r", 8),
        alpha=reader.alpha("lora_alpha", 8),
        rank_pattern=reader.patterns("rank_pattern", _AdapterReader.integer),
        alpha_pattern=reader.patterns("alpha_pattern", _AdapterReader.alpha),
        rslora=reader.flag("use_rslora", False),
        modules=reader.modules(),
        target_parameters=reader.parameter_names("target_parameters"),
    )
    reader.refuse_rest()
    return checked


class _AdapterReader(TypedReader):
    """Typed access to the config, or to one of its tables; raises AdapterError."""

    error_class = AdapterError
    null_is_absent = False

    def refuse_other_methods(self) -> None:
        """Refuses what is not plain LoRA."""
        if self.raw("peft_type") != "LORA":
            raise self.error("not a LoRA adapter", "peft_type", "LORA")
        if self.raw("bias", "none") != "none":
            raise self.error("adapters that train biases are not supported", "bias", "none")
        if self.raw("init_lora_weights") not in _PLAIN_INITS:
            what = "this initialization changed the base weights; convert the adapter with PEFT"
            raise self.error(what, "init_lora_weights", "true")
        # PEFT ignores this setting for linear layers, with a warning; embeddings do not use it.
        self.flag("fan_in_fan_out", False)

    def modules(self) -> ModuleSelection:
        """Which modules are adapted."""
        layers = self.raw("layers_to_transform", [])
        given = layers if isinstance(layers, list) else [layers]
        numbers = frozenset(number for number in given if type(number) is int)
        if any(type(number) is not int for number in given):
            expected = "a number or a list of numbers"
            raise self.error("not the numbers of layers", "layers_to_transform", expected)
        if not numbers:
            self.raw("layers_pattern")  # has no effect then
        return ModuleSelection(
            ModuleNames(self.text_or_names("target_modules")),
            ModuleNames(self.text_or_names("exclude_modules"), excluded=True),
            numbers,
        )

    def text_or_names(self, key: str) -> str | tuple[str, ...]:
        return self.text(key) if isinstance(self.raw(key), str) else self.names(key)

    def alpha(self, key: str, default: float | None = None) -> float:
        return self.number(key, default, low=-_MAX_ALPHA, high=_MAX_ALPHA)

    def patterns(self, key: str, read: Callable[[_AdapterReader, str], T]) -> PatternTable[T]:
        """A table whose keys are regular expressions; `read` reads one of its values."""
        table = self.section(key)
        values = {pattern: read(table, pattern) for pattern in table.all_keys}
        try:
            return PatternTable(values)
        except UnsupportedPatternError as error:
            raise self.error(f"not a supported regular expression: {error}", key) from error

    def parameter_names(self, key: str) -> tuple[str, ...]:
        names = self.names(key)
        if len(names) > _MAX_PARAMETERS:
            expected = f"at most {_MAX_PARAMETERS:,} names"
            raise self.error(f"a list of {len(names):,} names", key, expected)
        return names

    def refuse_rest(self) -> None:
        """Refuses the keys that were not read, unless they are ignored or not set."""
        for key in sorted(self._values.keys() - self._read - _IGNORED):
            if self._values[key] not in (None, False, {}, []):
                raise self.error("this adapter setting is not supported", key, "null")
