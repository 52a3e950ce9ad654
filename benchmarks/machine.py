"""The context of a measurement: date, machine, versions; no names or paths."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

_PACKAGES = ("jax", "numpy", "safetensors", "torch", "transformers", "orbax-checkpoint")


def facts() -> dict[str, object]:
    """Date, machine and versions, in JSON types."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def describe(found: dict) -> str:
    """One line with the facts."""
    memory = found["memory_bytes"] / 2**30
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"{found['date']}; {found['cores']} cores, {memory:.0f} GiB, {found['processor']}; "
        f"{found['system']}, Python {found['python']}, {versions}"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name on Linux; elsewhere its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
