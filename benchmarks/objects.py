"""Loading over a slow network: `python -m benchmarks.objects`.

A server in its own process waits before each answer and limits the rate of each connection, as
object stores do. Measured in turn: reading one tensor after another; downloading all files at once,
then loading them; mtj_loader. Every byte of mtj_loader's result is compared with the files once.
"""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import jax
import numpy as np
import typer
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import mtj_loader
from benchmarks import machine
from benchmarks.checkpoint import SHAPES, checkpoint
from benchmarks.load import CACHE, RESULTS
from mtj_loader.dtypes import WEIGHT_DTYPES
from mtj_loader.formats.checkpoint import open_checkpoint
from mtj_loader.loading.verify import verify
from mtj_loader.options import Source
from tests.support.object_server import serve

_FILE_BYTES = 100_000_000  # several files of a small model
_CONNECTIONS = 32  # of mtj_loader; they determine the floor

Loader = Callable[[str], object]  # takes a URL; its result is kept until the clock stops


def main(
    *,
    shape: Annotated[str, typer.Option(help=f"one of {', '.join(SHAPES)}")] = "pythia-160m",
    latency_ms: Annotated[float, typer.Option(help="before each answer")] = 50.0,
    rate_mb: Annotated[float, typer.Option(help="MB/s on each connection")] = 20.0,
    runs: Annotated[int, typer.Option(help="timed runs of each loader")] = 3,
    cache: Annotated[Path, typer.Option(help="where synthetic checkpoints are kept")] = CACHE,
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = RESULTS,
    serving: Annotated[bool, typer.Option("--serving", hidden=True)] = False,
) -> None:
    """Measures the loaders in turn; prints a table and writes JSON."""
    folder = checkpoint(shape, cache, _FILE_BYTES)
    if serving:
        _serve(folder, latency_ms / 1e3, round(rate_mb * 1e6))
        return
    console = Console()
    with _server(shape, latency_ms, rate_mb, cache) as url:
        _check(url)
        found = _run_interleaved(url, runs, lambda line: console.print(f"  {line}"))
    size_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    result = {
        "shape": shape,
        "bytes": size_bytes,
        "latency_ms": latency_ms,
        "connection_bytes_per_second": rate_mb * 1e6,
        "floor_seconds": size_bytes / (_CONNECTIONS * rate_mb * 1e6) + latency_ms / 1e3,
        "machine": machine.facts(),
        "seconds": found,
        "medians": {name: statistics.median(seconds) for name, seconds in found.items()},
    }
    console.print(table(result))
    out.mkdir(parents=True, exist_ok=True)
    (out / "objects.json").write_text(json.dumps(result, indent=1) + "\n")


def table(result: dict) -> Table:
    """The medians as a table."""
    rate = result["connection_bytes_per_second"] / 1e6
    title = f"{result['shape']}, {result['bytes'] / 1e6:,.0f} MB, {result['latency_ms']:.0f} ms"
    grid = Table(title=f"{title} before each answer, {rate:.0f} MB/s on each connection")
    grid.caption = machine.describe(result["machine"])
    grid.add_column("medians")
    for column in ("seconds", "MB/s", "÷ floor"):
        grid.add_column(column, justify="right")
    floor = {f"floor: {_CONNECTIONS} connections, full": result["floor_seconds"]}
    for name, seconds in (floor | result["medians"]).items():
        speed, ratio = result["bytes"] / 1e6 / seconds, seconds / result["floor_seconds"]
        grid.add_row(name, f"{seconds:.2f}", f"{speed:.0f}", f"{ratio:.2f}")
    return grid


def tensor_by_tensor(url: str) -> object:
    """Reads one tensor after another on one connection and puts each on the device."""
    checkpoint = open_checkpoint(Source(url))
    placed = NamedSharding(mtj_loader.make_mesh("mp=1"), PartitionSpec())
    server, base = _connection(url)
    arrays = []
    for record in checkpoint.index.records.values():
        last = record.offset_bytes + record.size_bytes - 1
        headers = {"Range": f"bytes={record.offset_bytes}-{last}"}
        server.request("GET", f"{base}/{record.file}", headers=headers)
        data = np.frombuffer(server.getresponse().read(), WEIGHT_DTYPES[record.dtype])
        arrays.append(jax.device_put(data.reshape(record.shape), placed))
    server.close()
    return jax.block_until_ready(arrays)


def download_then_load(url: str) -> object:
    """Downloads all files at once, each on one connection; then mtj_loader loads the folder."""
    names = [*open_checkpoint(Source(url)).index.files]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(names)) as pool:
        names += ["config.json", "model.safetensors.index.json"]
        list(pool.map(lambda name: _download(url, name, Path(folder)), names))
        return mtj_loader.load(folder, "mp=1", progress=False)


def ours(url: str) -> mtj_loader.Model:
    """mtj_loader with default options."""
    return mtj_loader.load(url, "mp=1", progress=False)


def ours_in_64_mib(url: str) -> mtj_loader.Model:
    """mtj_loader with the minimum memory in flight."""
    return mtj_loader.load(url, "mp=1", progress=False, host_memory="64MiB")


LOADERS: dict[str, Loader] = {
    "tensor by tensor": tensor_by_tensor,
    "download, then load": download_then_load,
    "ours": ours,
    "ours, host_memory=64MiB": ours_in_64_mib,
}


def _run_interleaved(url: str, runs: int, log: Callable[[str], None]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in LOADERS}
    for i in range(runs):
        for name, load in LOADERS.items():
            started = time.perf_counter()
            kept = load(url)
            found[name].append(time.perf_counter() - started)
            del kept
            log(f"run {i + 1} of {runs}, {name}: {found[name][-1]:.2f} s")
    return found


def _check(url: str) -> None:
    """Compares every byte that mtj_loader loads with the files, and checks how much it read."""
    for model in (ours(url), ours_in_64_mib(url)):
        with model.plan.checkpoint.storage:
            verify(model.plan, model.params)
        assert model.report.bytes_read <= 1.02 * model.report.bytes_needed


@contextmanager
def _server(shape: str, latency_ms: float, rate_mb: float, cache: Path) -> Iterator[str]:
    options = ["--latency-ms", latency_ms, "--rate-mb", rate_mb, "--cache", cache, "--serving"]
    command = [sys.executable, "-m", "benchmarks.objects", "--shape", shape, *map(str, options)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout.readline().decode().strip()
        process.communicate()  # closes its stdin, which stops the server


def _serve(folder: Path, latency_seconds: float, bytes_per_second: int) -> None:
    objects = {f"model/{path.name}": path.read_bytes() for path in folder.iterdir()}
    rates = dict.fromkeys(objects, bytes_per_second)
    with serve(objects, latency_seconds=latency_seconds, rates=rates) as server:
        print(f"{server.url}/model", flush=True)
        sys.stdin.read()


def _connection(url: str) -> tuple[http.client.HTTPConnection, str]:
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.netloc), parts.path


def _download(url: str, name: str, folder: Path) -> None:
    server, base = _connection(url)
    server.request("GET", f"{base}/{name}")
    (folder / name).write_bytes(server.getresponse().read())
    server.close()


if __name__ == "__main__":
    typer.run(main)
