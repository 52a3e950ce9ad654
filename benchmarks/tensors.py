"""Fixed cost per tensor: `python -m benchmarks.tensors`.

Loads models of a thousand and of several thousand tiny tensors, and compares with JAX's own calls
for the same arrays in the same process: what the loader adds is the rest.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import machine
from benchmarks.checkpoint import Shape, write


def main(
    *,
    layers: Annotated[str, typer.Option(help="numbers of layers, of 12 tensors each")] = "80,800",
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
    for count in map(int, layers.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            write(Shape(count, 64, 8, vocab_size=512), Path(folder))
            rows += [_run(folder, int(n), runs) | {"devices": int(n)} for n in devices.split(",")]
    for row in rows:
        print(
            f"{row['tensors']:>6} tensors on {row['devices']} devices: plan {row['plan']:.0f}, "
            f"load {row['load']:.0f}, JAX's calls alone {row['jax']:.0f} µs per tensor"
        )
    out.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine.facts(), "microseconds_per_tensor": rows}
    (out / "tensors.json").write_text(json.dumps(result, indent=1))


def _run(folder: str, devices: int, runs: int) -> dict[str, float]:
    """The probe in a process with so many devices."""
    flags = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-m", "benchmarks.tensors", "--probe", folder, "--runs", str(runs)]
    done = subprocess.run(command, capture_output=True, check=True, env=os.environ | flags)
    return json.loads(done.stdout)


def _probe(folder: Path, runs: int) -> dict[str, float]:
    """Microseconds per tensor, medians: planning, loading, and JAX's share of loading."""
    from mtj_loader import load, make_mesh  # noqa: PLC0415 - not needed to start probes

    mesh = make_mesh()
    load(folder, mesh, progress=False)
    seconds: dict[str, list[float]] = {"plan": [], "load": [], "jax": []}
    for _ in range(runs):
        model = load(folder, mesh, progress=False)
        seconds["plan"].append(model.report.seconds["plan"])
        seconds["load"].append(model.report.seconds["load"])
        seconds["jax"].append(_bare(model.params))
    tensors = model.report.parameters
    per_tensor = {key: 1e6 * statistics.median(values) / tensors for key, values in seconds.items()}
    return {"tensors": tensors} | per_tensor


def _bare(params: dict) -> float:
    """Seconds that JAX takes to make the same arrays from host memory that it can adopt."""
    import jax  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    leaves = jax.tree.leaves(params)
    hosts = [np.asarray(leaf) for leaf in leaves]
    begun = time.perf_counter()
    made = [
        jax.make_array_from_callback(leaf.shape, leaf.sharding, host.__getitem__)
        for leaf, host in zip(leaves, hosts, strict=True)
    ]
    jax.block_until_ready(made)
    return time.perf_counter() - begun


if __name__ == "__main__":
    typer.run(main)
