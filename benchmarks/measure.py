"""Measures one load in this process: `python -m benchmarks.measure NAME FOLDER [--check]`.

Prints one line of JSON. The clock starts after imports and after JAX's backend has started.
"""

from __future__ import annotations

import argparse
import importlib
import json
import mmap
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_STATUS = "/proc/self/status"

# Name → "module:function" that loads. A loader's libraries are imported only in its own process.
LOADERS = {
    "floor": "floor:load",
    "ours, transposed_linear": "ours:load_transposed_linear",
    "ours, transposes": "ours:load",
    "transformers": "torch_model:load",
    "transformers, mapped only": "torch_model:load_mapped",
    "kobold rule": "kobold:load",
    "safetensors.numpy": "safetensors_numpy:load",
    "orbax safetensors": "orbax:load",
}


def main() -> None:
    """Measures one loader once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=LOADERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="compare every byte afterwards")
    print(json.dumps(measure(**vars(parser.parse_args()))))


def measure(name: str, folder: Path, check: bool) -> dict[str, object]:
    """Seconds, peak memory and bytes read of one load."""
    module, function = LOADERS[name].split(":")
    load = getattr(importlib.import_module(f"benchmarks.loaders.{module}"), function)
    mesh = warm_mesh(folder)
    warm_memory(sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    resident, read = _line_bytes(_STATUS, "VmRSS"), _bytes_read()
    started, cpu_seconds = time.perf_counter(), time.process_time()
    loaded = load(folder, mesh)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_seconds
    parameter_bytes = loaded.parameter_bytes()
    counted = _bytes_read() - read if loaded.bytes_read is None else loaded.bytes_read
    return {
        "seconds": seconds,
        "processor_seconds": cpu_seconds,
        "extra_bytes": _line_bytes(_STATUS, "VmHWM") - resident - parameter_bytes,
        "parameter_bytes": parameter_bytes,
        "bytes_read": counted,
        "bytes_checked": loaded.check() if check else 0,
        "details": loaded.details,
    }


def warm_mesh(folder: Path) -> Mesh:
    """A mesh of as many devices as the heads allow, after a first transfer to each device."""
    heads = json.loads((folder / "config.json").read_text())["num_attention_heads"]
    shards = max(n for n in range(1, len(jax.devices()) + 1) if heads % n == 0)
    mesh = Mesh(np.array(jax.devices()[:shards]).reshape(1, shards), ("dp", "mp"))
    sharded = NamedSharding(mesh, PartitionSpec("mp"))
    jax.block_until_ready(jax.device_put(np.zeros(mesh.size), sharded))
    return mesh


def warm_memory(size_bytes: int) -> None:
    """Touches and frees the memory that a load of `size_bytes` may use.

    Virtual machines return free memory to their host after about two seconds. Getting it back costs
    ten times as much as zeroing a page and would dominate the measurement.
    """
    available = _line_bytes("/proc/meminfo", "MemAvailable")
    size_bytes = min(int(_WARM_SHARE * size_bytes) + _WARM_REST_BYTES, available * 3 // 4)
    with mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1


# The most that a loader needs for a checkpoint of 2.8 GB: the parameters and 1.2 GB more.
_WARM_SHARE, _WARM_REST_BYTES = 1.2, 1 << 30


def _line_bytes(file: str, key: str) -> int:
    """The value of a line of /proc/self/status or /proc/meminfo, which are in KiB."""
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def _bytes_read() -> int:
    """Bytes that read calls of this process returned so far; mapped reads do not count."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))


if __name__ == "__main__":
    main()
