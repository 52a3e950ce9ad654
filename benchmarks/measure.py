"""One measurement in a process of its own: `python -m benchmarks.measure NAME FOLDER [--check]`.

Prints one line of JSON. Imports and the start of JAX's backend are over before the clock starts.
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

# Name → the function that loads, as "module:function"; a contender's libraries are imported only
# in its own process.
CONTENDERS = {
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
    """Measures one contender once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="compare every byte, after the clock")
    print(json.dumps(measure(**vars(parser.parse_args()))))


def measure(name: str, folder: Path, check: bool) -> dict[str, object]:
    """Seconds, peak memory and bytes read of one load."""
    module, function = CONTENDERS[name].split(":")
    load = getattr(importlib.import_module(f"benchmarks.contenders.{module}"), function)
    mesh = warm_mesh(folder)
    warm_memory(sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    resident, read = _line_bytes(_STATUS, "VmRSS"), _bytes_read()
    begun, busy = time.perf_counter(), time.process_time()
    loaded = load(folder, mesh)
    seconds, busy = time.perf_counter() - begun, time.process_time() - busy
    parameter_bytes = loaded.parameter_bytes()
    counted = _bytes_read() - read if loaded.bytes_read is None else loaded.bytes_read
    return {
        "seconds": seconds,
        "processor_seconds": busy,
        "extra_bytes": _line_bytes(_STATUS, "VmHWM") - resident - parameter_bytes,
        "parameter_bytes": parameter_bytes,
        "bytes_read": counted,
        "bytes_checked": loaded.check() if check else 0,
        "details": loaded.details,
    }


def warm_mesh(folder: Path) -> Mesh:
    """A mesh of as many devices as the heads allow, each of which has already taken an array."""
    heads = json.loads((folder / "config.json").read_text())["num_attention_heads"]
    shards = max(n for n in range(1, len(jax.devices()) + 1) if heads % n == 0)
    mesh = Mesh(np.array(jax.devices()[:shards]).reshape(1, shards), ("dp", "mp"))
    sharded = NamedSharding(mesh, PartitionSpec("mp"))
    jax.block_until_ready(jax.device_put(np.zeros(mesh.size), sharded))
    return mesh


def warm_memory(size_bytes: int) -> None:
    """Touches and frees what a load of so many bytes may take.

    Virtual machines give free memory back to their host after about two seconds; taking it again
    costs ten times what zeroing a page does, and would be most of what is measured.
    """
    available = _line_bytes("/proc/meminfo", "MemAvailable")
    size_bytes = min(int(_WARM_SHARE * size_bytes) + _WARM_REST_BYTES, available * 3 // 4)
    with mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1


# What the hungriest contender takes for a checkpoint of 2.8 GB: the parameters and 1.2 GB more.
_WARM_SHARE, _WARM_REST_BYTES = 1.2, 1 << 30


def _line_bytes(file: str, key: str) -> int:
    """A line of /proc/self/status or /proc/meminfo, which count in KiB."""
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def _bytes_read() -> int:
    """What read calls of this process brought so far; reads through a mapping do not count."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))


if __name__ == "__main__":
    main()
