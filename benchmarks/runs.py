"""Running contenders by turns, each in a process of its own, and the medians of what they say."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.measure import CONTENDERS

DEVICES = 8  # virtual CPU devices: the cores of a v2-8 or v3-8, the smallest TPU VM of its time
_NEEDS = {"transformers": ("torch", "transformers"), "orbax": ("orbax",)}  # beginnings of names

Run = dict[str, object]


def chosen(only: Sequence[str]) -> list[str]:
    """The contenders whose names begin with one of `only`, as far as their libraries are there."""
    names = [name for name in CONTENDERS if not only or name.startswith(tuple(only))]
    return [name for name in names if all(map(importlib.util.find_spec, _needs(name)))]


def _needs(name: str) -> tuple[str, ...]:
    return next((needs for start, needs in _NEEDS.items() if name.startswith(start)), ())


def by_turns(
    names: Sequence[str],
    folder: Path,
    runs: int,
    *,
    cold: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, list[Run]]:
    """Runs every contender `runs` times, one after the other, so that drift touches all alike.

    Args:
      names: keys of CONTENDERS.
      folder: the checkpoint.
      runs: timed runs of each. One more comes first and is not counted: it checks every byte, and
        leaves the files in the page cache.
      cold: the files leave the page cache before each timed run.
      tell: called with a line after each run.
    """
    found: dict[str, list[Run]] = {name: [] for name in names}
    for name in names:
        tell(f"{name}: {run(name, folder, check=True)['bytes_checked']:,} bytes checked")
    for i in range(runs):
        for name in names:
            if cold:
                forget(folder)
            found[name].append(run(name, folder))
            tell(f"run {i + 1} of {runs}, {name}: {found[name][-1]['seconds']:.2f} s")
    return found


def run(name: str, folder: Path, *, check: bool = False) -> Run:
    """One load in a new process.

    Raises:
      RuntimeError: it failed; with what it wrote to stderr.
    """
    command = [sys.executable, "-m", "benchmarks.measure", name, str(folder)]
    done = subprocess.run(
        [*command, "--check"] if check else command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
            "HF_HUB_OFFLINE": "1",
        },
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def forget(folder: Path) -> None:
    """Asks the kernel to drop a checkpoint from the page cache."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def medians(found: dict[str, list[Run]]) -> dict[str, dict[str, float]]:
    """Per contender the medians of seconds and memory, and the ratio of seconds to the floor's."""
    result = {}
    for name, runs in found.items():
        values = {key: statistics.median(run[key] for run in runs) for key in _MEDIANS}
        result[name] = values | {"fastest_seconds": min(run["seconds"] for run in runs)}
    if "floor" in result:
        for values in result.values():
            values["ratio"] = values["seconds"] / result["floor"]["seconds"]
    return result


_MEDIANS = ("seconds", "processor_seconds", "extra_bytes", "parameter_bytes", "bytes_read")
