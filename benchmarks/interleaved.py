"""Runs loaders in turn, each in its own process, and computes medians of their results."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.measure import LOADERS

DEVICES = 8  # virtual CPU devices, as many as the cores of the smallest TPU VMs, v2-8 and v3-8
_NEEDS = {"transformers": ("torch", "transformers"), "orbax": ("orbax",)}  # by prefix of the name

Run = dict[str, object]


def select(only: Sequence[str]) -> list[str]:
    """The loaders whose names start with one of `only` and whose libraries are installed."""
    names = [name for name in LOADERS if not only or name.startswith(tuple(only))]
    return [name for name in names if all(map(importlib.util.find_spec, _needs(name)))]


def _needs(name: str) -> tuple[str, ...]:
    return next((needs for start, needs in _NEEDS.items() if name.startswith(start)), ())


def run_interleaved(
    names: Sequence[str],
    folder: Path,
    runs: int,
    *,
    cold: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, list[Run]]:
    """Runs every loader `runs` times, in turn, so that drift of the machine affects all equally.

    Args:
      names: keys of LOADERS.
      folder: the checkpoint.
      runs: timed runs of each. One untimed run comes first: it checks every byte and brings the
        files into the page cache.
      cold: drop the files from the page cache before each timed run.
      log: called with a line after each run.
    """
    found: dict[str, list[Run]] = {name: [] for name in names}
    for name in names:
        log(f"{name}: {run(name, folder, check=True)['bytes_checked']:,} bytes checked")
    for i in range(runs):
        for name in names:
            if cold:
                drop_page_cache(folder)
            found[name].append(run(name, folder))
            log(f"run {i + 1} of {runs}, {name}: {found[name][-1]['seconds']:.2f} s")
    return found


def run(name: str, folder: Path, *, check: bool = False) -> Run:
    """Measures one load in a new process.

    Raises:
      RuntimeError: the process failed; the message contains its stderr.
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


def drop_page_cache(folder: Path) -> None:
    """Asks the kernel to drop a checkpoint from the page cache."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def medians(found: dict[str, list[Run]]) -> dict[str, dict[str, float]]:
    """Per loader: medians of seconds and memory, and the ratio of its seconds to the floor's."""
    result = {}
    for name, runs in found.items():
        values = {key: statistics.median(run[key] for run in runs) for key in _MEDIANS}
        result[name] = values | {"fastest_seconds": min(run["seconds"] for run in runs)}
    if "floor" in result:
        for values in result.values():
            values["ratio"] = values["seconds"] / result["floor"]["seconds"]
    return result


_MEDIANS = ("seconds", "processor_seconds", "extra_bytes", "parameter_bytes", "bytes_read")
