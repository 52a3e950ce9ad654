"""What a compiled program depends on, beside the shapes of its arguments."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mtj_loader.programs.cpu_features import CPU_FEATURES, cpu_features
from mtj_loader.version import version

_PACKAGES = ("jax", "jaxlib", "dm-haiku")
# Options of JAX that change what is traced or computed.
_JAX_OPTIONS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
)
# Flags that do not change programs; the number of devices is part of the mesh.
_IRRELEVANT_FLAGS = ("--xla_dump_", "--xla_force_host_platform_device_count")

_FEATURES_SHOWN = 8  # of a CPU, in a sentence

_SIZES = ("slots", "context")

_Facts = Mapping[str, str]


@dataclass(frozen=True)
class ProgramFacts:
    """What must be equal for a stored program to be used.

    Attributes:
      model: what the program is for: the config's digest, mesh, dtype, slots, context and
        transposed_linear, each as text.
      versions: of the packages that trace and compile; `source` is a digest of this package's code.
      platform: platform, device kind and XLA's version of the platform; on CPUs also the features
        of the processor, separated by spaces.
      settings: options of JAX and flags of XLA that change programs.
    """

    model: _Facts
    versions: _Facts
    platform: _Facts
    settings: _Facts

    @classmethod
    def collect(
        cls,
        config: Any,  # noqa: ANN401
        mesh: Mesh,
        *,
        dtype: np.dtype,
        slots: int,
        context: int,
        transposed_linear: bool,
    ) -> ProgramFacts:
        """The facts of programs compiled by this process.

        Args:
          config: of the model; a dataclass.
          mesh: of devices, or of a topology's devices that are not there.
          dtype: of the parameters and the cache.
          slots: rows of the cache.
          context: its length, in tokens.
          transposed_linear: whether linear weights are [out, in].
        """
        model = {
            "config": _digest_config(config),
            "mesh": ",".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
            "devices": ",".join(str(device.id) for device in mesh.devices.flat),
            "dtype": dtype.name,
            "slots": str(slots),
            "context": str(context),
            "transposed_linear": str(transposed_linear),
        }
        device = mesh.devices.flat[0]
        platform = device.platform
        return cls(model, _versions(platform), _platform(device), _settings(platform))

    @property
    def folder_name(self) -> str:
        """A name for the folder of programs for this model and device, with any sizes.

        It is the same for all versions of JAX.
        """
        model = {key: fact for key, fact in self.model.items() if key not in _SIZES}
        device = {key: self.platform[key] for key in ("platform", "device_kind")}
        text = json.dumps(model | device, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def sizes(self) -> tuple[str, str]:
        """The slots and the context, as stated; they may come from a file."""
        slots, context = (self.model.get(key, "") for key in _SIZES)
        return slots, context

    def with_sizes(self, slots: int, context: int) -> ProgramFacts:
        """The facts of programs for other sizes."""
        return replace(self, model={**self.model, "slots": str(slots), "context": str(context)})

    def to_dict(self) -> dict[str, dict[str, str]]:
        """The facts as JSON types."""
        return {section: dict(facts) for section, facts in vars(self).items()}


def differences(stored: ProgramFacts, wanted: ProgramFacts) -> list[str]:
    """Why programs with the facts `stored` cannot be used where `wanted` holds, as sentences.

    An empty list means that they can.
    """
    return [
        sentence
        for section, describe in _DESCRIBE.items()
        for key, old, new in _unequal(getattr(stored, section), getattr(wanted, section))
        for sentence in describe(key, old, new)
    ] + _describe_unreadable_cpu(wanted)


def _unequal(stored: _Facts, wanted: _Facts) -> Iterator[tuple[str, str | None, str | None]]:
    for key in sorted(stored.keys() | wanted.keys()):
        if stored.get(key) != wanted.get(key):
            yield key, stored.get(key), wanted.get(key)


def _describe_model(key: str, old: str | None, new: str | None) -> Iterator[str]:
    yield (
        "compiled for another config"
        if key == "config"
        else f"compiled for {key} {old}, this is {new}"
    )


def _describe_version(key: str, old: str | None, new: str | None) -> Iterator[str]:
    if key == "source":
        yield "compiled by other source code of mtj_loader"
    elif new is None:
        yield f"compiled with {key} {old}, which is not installed"
    else:
        yield (
            f"compiled with {key} {old}, this is {new}" if old else f"compiled without {key} {new}"
        )


def _describe_platform(key: str, old: str | None, new: str | None) -> Iterator[str]:
    if key != CPU_FEATURES:
        yield f"compiled for {key} {old}, this is {new}"
        return
    had, has = set((old or "").split()), set((new or "").split())
    if had - has:
        yield f"compiled for a CPU with {_brief(had - has)}, which this one lacks"
    if has - had:
        yield f"compiled for a CPU without {_brief(has - had)}, which this one has"


def _brief(features: set[str]) -> str:
    shown = sorted(features)[:_FEATURES_SHOWN]
    more = len(features) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _describe_setting(key: str, old: str | None, new: str | None) -> Iterator[str]:
    yield f"compiled with {key} = {old or 'nothing'}, here it is {new or 'nothing'}"


def _describe_unreadable_cpu(facts: ProgramFacts) -> list[str]:
    unreadable = facts.platform["platform"] == "cpu" and not facts.platform.get(CPU_FEATURES)
    return ["the features of this CPU cannot be read"] if unreadable else []


_DESCRIBE = {
    "model": _describe_model,
    "versions": _describe_version,
    "platform": _describe_platform,
    "settings": _describe_setting,
}


def _digest_config(config: Any) -> str:  # noqa: ANN401
    """SHA-256 over the class and all attributes of a config."""
    values = {"class": type(config).__qualname__, **dataclasses.asdict(config)}
    text = json.dumps(values, sort_keys=True, default=_to_json)
    return hashlib.sha256(text.encode()).hexdigest()


def _to_json(value: object) -> object:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, frozenset | set):
        return sorted(value)
    raise TypeError(f"cannot digest a {type(value).__name__}")


def _versions(platform: str) -> _Facts:
    names = (*_PACKAGES, "libtpu") if platform == "tpu" else _PACKAGES
    found = {name: _installed_version(name) for name in names}
    versions = {name: number for name, number in found.items() if number is not None}
    return {**versions, "mtj_loader": version(), "source": _source_digest()}


def _installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def _source_digest() -> str:
    """SHA-256 over this package's code: a checkout may change without its version."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _platform(device: Any) -> _Facts:  # noqa: ANN401 -- of jax.Device and of topologies
    facts = {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "platform_version": _normalize_version(device.client.platform_version),
    }
    return facts | ({CPU_FEATURES: cpu_features()} if device.platform == "cpu" else {})


def _normalize_version(text: str) -> str:
    """XLA's version of a platform, in one line.

    Clients with devices, but not those that only compile, put the name of the interface before it.
    """
    return " ".join(text.removeprefix("PJRT C API\n").split())


def _settings(platform: str) -> _Facts:
    options = {name: str(getattr(jax.config, name)) for name in _JAX_OPTIONS}
    variables = ("XLA_FLAGS", "LIBTPU_INIT_ARGS") if platform == "tpu" else ("XLA_FLAGS",)
    return options | {name: _flags(os.environ.get(name, "")) for name in variables}


def _flags(text: str) -> str:
    return " ".join(sorted(f for f in text.split() if not f.startswith(_IRRELEVANT_FLAGS)))
