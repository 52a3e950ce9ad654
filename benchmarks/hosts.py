"""Bytes that each of several hosts reads: `python -m benchmarks.hosts`.

The hosts are processes on this machine with two virtual devices each. The result is that all hosts
together read the bytes of the checkpoint once. The times mean little, because the hosts share the
cores and the page cache.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.checkpoint import SHAPES, checkpoint
from benchmarks.load import CACHE, RESULTS

DEVICES = 2  # per host
# Number of hosts, and a mesh that the 12 heads of pythia-160m allow.
POD = ((1, "dp=1,mp=2"), (2, "dp=1,mp=4"), (2, "dp=2,mp=2"), (4, "dp=2,mp=4"), (4, "dp=4,mp=2"))
_TIMES = "Times are only indicative: all hosts share the cores and page cache of one machine."
_SECONDS = 300  # for a whole load; a process that hangs is killed


def main(
    *,
    shape: Annotated[str, typer.Option(help=f"one of {', '.join(SHAPES)}")] = "pythia-160m",
    cache: Annotated[Path, typer.Option(help="where synthetic checkpoints are kept")] = CACHE,
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = RESULTS,
    probe: Annotated[str, typer.Option(hidden=True, help="what to load in this process")] = "",
) -> None:
    """Loads on 1, 2 and 4 hosts; prints what each host reads and writes JSON."""
    if probe:
        print(json.dumps(_probe(**json.loads(probe))))
        return
    console = Console()
    folder = checkpoint(shape, cache)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    unique = index["metadata"]["total_size"]
    rows = [_load(folder, count, mesh, unique) for count, mesh in POD]
    result = {"machine": machine.facts(), "shape": shape, "bytes": unique, "loads": rows}
    console.print(table(result))
    out.mkdir(parents=True, exist_ok=True)
    (out / "hosts.json").write_text(json.dumps(result, indent=1))


def table(result: dict) -> Table:
    """The loads as a table."""
    grid = Table(title=f"{result['shape']}, {result['bytes'] / 1e6:.1f} MB")
    grid.caption = f"{machine.describe(result['machine'])}\n{_TIMES}"
    for column in ("hosts", "mesh", "read by each, MB", "÷ unique", "received by each, MB"):
        grid.add_column(column, justify="right")
    grid.add_column("seconds on each", justify="right")
    grid.add_column("of these, exchange", justify="right")
    for row in result["loads"]:
        hosts = row["hosts"]
        grid.add_row(
            str(len(hosts)),
            row["mesh"],
            ", ".join(f"{host['bytes_read'] / 1e6:.1f}" for host in hosts),
            f"{row['ratio']:.4f}",
            ", ".join(f"{host['bytes_received'] / 1e6:.1f}" for host in hosts),
            ", ".join(f"{host['seconds']['load']:.2f}" for host in hosts),
            ", ".join(f"{host['seconds']['exchange']:.2f}" for host in hosts),
        )
    return grid


def _load(folder: Path, count: int, mesh: str, unique: int) -> dict:
    """Runs one load on `count` hosts and collects their reports."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = {"folder": str(folder), "mesh": mesh, "address": address, "count": count}
    hosts = [_start(options | {"host": k}) for k in range(count)]
    reports = [_wait(host) for host in hosts]
    ratio = sum(report["bytes_read"] for report in reports) / unique
    return {"mesh": mesh, "ratio": ratio, "hosts": reports}


def _start(probe: dict) -> subprocess.Popen[str]:
    flags = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
    }
    command = [sys.executable, "-m", "benchmarks.hosts", "--probe", json.dumps(probe)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | flags,
    )


def _wait(process: subprocess.Popen[str]) -> dict:
    """Waits for a host; returns the JSON document on its last line.

    Raises:
      RuntimeError: the host failed; the message contains its stderr.
    """
    try:
        printed, errors = process.communicate(timeout=_SECONDS)
    finally:
        process.kill()
    if process.returncode:
        raise RuntimeError(f"a host failed:\n{errors}")
    return json.loads(printed.splitlines()[-1])


def _probe(folder: str, mesh: str, address: str, count: int, host: int) -> dict:
    """Loads this host's part and compares its bytes with the files."""
    import jax  # noqa: PLC0415 -- only probes need it

    if count > 1:
        jax.distributed.initialize(address, count, host)
    from mtj_loader import load  # noqa: PLC0415
    from mtj_loader.loading.verify import verify  # noqa: PLC0415

    model = load(folder, mesh, progress=False)
    report = model.report.to_dict()
    kept = ("bytes_needed", "bytes_read", "bytes_received", "seconds", "peak_host_bytes")
    return {key: report[key] for key in kept} | {"verified": verify(model.plan, model.params)}


if __name__ == "__main__":
    typer.run(main)
