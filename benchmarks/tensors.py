"""Fixed cost per tensor: `python -m benchmarks.tensors`.

Loads models of a thousand to a hundred thousand tiny tensors. If each tensor becomes one array,
JAX's own calls for the same arrays are measured in the same process for comparison.
Experts become a few large arrays and show the cost per tensor alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import typer

from benchmarks import machine
from benchmarks.checkpoint import Mixture, Shape, write
from mtj_loader import load, make_mesh


def main(
    *,
    only: Annotated[str, typer.Option(help="part of a model's name")] = "",
    devices: Annotated[str, typer.Option(help="numbers of virtual devices")] = "1,8",
    runs: Annotated[int, typer.Option(help="loads of each; medians are shown")] = 5,
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = Path("benchmarks/results"),
    probe: Annotated[str, typer.Option(hidden=True, help="folder to load in this process")] = "",
) -> None:
    """Prints microseconds per tensor."""
    if probe:
        print(json.dumps(_probe(Path(probe), runs)))
        return
    rows = []
    for name in (name for name in MODELS if only in name):
        with tempfile.TemporaryDirectory() as folder:
            write(MODELS[name], Path(folder))
            for count in map(int, devices.split(",")):
                row = {"model": name, "devices": count} | _run(folder, count, runs)
                rows.append(row)
                costs = (f"{key} {row[key]:.0f}" for key in ("plan", "load", *_BARE) if key in row)
                print(
                    f"{name}, {row['tensors']:,} tensors on {count} devices, µs per tensor: "
                    + ", ".join(costs),
                    flush=True,
                )
    out.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine.facts(), "microseconds_per_tensor": rows}
    (out / "tensors.json").write_text(json.dumps(result, indent=1) + "\n")


def _run(folder: str, devices: int, runs: int) -> dict[str, float]:
    """Runs the probe in a process with this number of devices."""
    flags = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-m", "benchmarks.tensors", "--probe", folder, "--runs", str(runs)]
    done = subprocess.run(command, capture_output=True, check=True, env=os.environ | flags)
    return json.loads(done.stdout)


def _probe(folder: Path, runs: int) -> dict[str, float]:
    """Median microseconds per tensor of planning, loading, and JAX's own calls."""
    mesh = make_mesh()
    load(folder, mesh, progress=False)
    seconds: dict[str, list[float]] = {key: [] for key in ("plan", "load", *_BARE)}
    for _ in range(runs):
        model = load(folder, mesh, progress=False)
        leaves = jax.tree.leaves(model.params)
        tensors = len(model.plan.checkpoint.index.records)
        seconds["plan"].append(model.report.seconds["plan"])
        seconds["load"].append(model.report.seconds["load"])
        if len(leaves) == tensors:
            for name, make in _BARE.items():
                seconds[name].append(_seconds(make, leaves))
        del model, leaves
    each = {k: 1e6 * statistics.median(found) / tensors for k, found in seconds.items() if found}
    return {"tensors": tensors} | each


def _seconds(make: Callable[[jax.Array, np.ndarray], object], leaves: list[jax.Array]) -> float:
    """The time of one way to create the same arrays from host memory that JAX can adopt."""
    hosts = [np.asarray(leaf) for leaf in leaves]
    started = time.perf_counter()
    jax.block_until_ready([make(leaf, host) for leaf, host in zip(leaves, hosts, strict=True)])
    return time.perf_counter() - started


def _callback(leaf: jax.Array, host: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, host.__getitem__)


def _put_with_sharding(leaf: jax.Array, host: np.ndarray) -> jax.Array:
    return jax.device_put(host, leaf.sharding)


def _put_list(leaf: jax.Array, host: np.ndarray) -> jax.Array:
    where = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    parts = jax.device_put([host[index] for index in where.values()], list(where))
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


MODELS = {
    "GPT-NeoX of 80 layers": Shape(80, 64, 8, vocab_size=512),
    "GPT-NeoX of 800 layers": Shape(800, 64, 8, vocab_size=512),
    "16 layers of 208 experts": Mixture(16, 208, 32, 32, 8, 8, 512),
    "128 layers of 256 experts": Mixture(128, 256, 32, 32, 8, 8, 512),
}

# The ways in JAX's documentation; the loader uses the first.
_BARE = {
    "make_array_from_callback": _callback,
    "device_put, NamedSharding": _put_with_sharding,
    "device_put of a list": _put_list,
}


if __name__ == "__main__":
    typer.run(main)
