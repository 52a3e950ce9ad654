"""Simulates all hosts of a pod, one after another: `python -m benchmarks.pod`.

GPT-NeoX-20B is a sparse file with random marks. The share of every host is read and placed in its
own process, and the digests of all shards are compared with numpy's, computed from the file.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks import machine, mtj_reference, sparse
from benchmarks.load import RESULTS
from benchmarks.sparse import NEOX_20B, SparseTensor

# Bytes between marks: a prime number of words, so that marks fall on different columns and every
# shard of a weight has some.
_MARK_STEP_BYTES = 8 * 16_381
_WHOLE_BYTES = 1 << 20  # smaller tensors are entirely random
# A memory file system if there is one: reading a hole costs nothing there, while on a disk it fills
# the page cache with 41 GB of zeros.
_MEMORY = next(filter(Path.is_dir, (Path("/dev/shm"), Path(tempfile.gettempdir()))))


def main(
    *,
    mesh: Annotated[str, typer.Option(help="the pod's mesh")] = "mp=64",
    hosts: Annotated[int, typer.Option(help="hosts; the share of each must fit into memory")] = 16,
    scratch: Annotated[Path, typer.Option(help="folder for 1.3 GB of temporary files")] = _MEMORY,
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = RESULTS,
) -> None:
    """Loads the share of every host and checks that the shares form the whole model."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        result = {"machine": machine.facts(), "mesh": mesh, **_measure(Path(folder), mesh, hosts)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "pod.json").write_text(json.dumps(result, indent=1))


def _measure(folder: Path, mesh: str, hosts: int) -> dict:
    """Loads every share, combines the digests and compares them."""
    started = time.perf_counter()
    records = _checkpoint(folder)
    files = [folder / f"digests-{k}.json" for k in range(hosts)]
    rows = [_load(folder, mesh, k, hosts, file) for k, file in enumerate(files)]
    combined = _combine(files)
    print(f"all {hosts} hosts: {combined['parameters']} parameters, SHA-256 {combined['sha256']}")
    expected = mtj_reference.digests(records, combined["shards"])
    equal = _compare([json.loads(file.read_text()) for file in files], expected)
    different = len({one for of in expected.values() for one in of.values()})
    print(f"{equal:,} digests of shards ({different:,} distinct) equal numpy's")
    unique = sum(record.size_bytes for record in records)
    read = sum(row["bytes_read"] for row in rows)
    print(f"{read:,} bytes read by all hosts, {read / unique:.4f} times those of the tensors")
    return {
        "model": "GPT-NeoX-20B",
        "bytes": unique,
        "bytes_read": read,
        "digests_equal": equal,
        "digests_different": different,
        "seconds": time.perf_counter() - started,
        **combined,
        "hosts": rows,
    }


def _checkpoint(folder: Path) -> list[SparseTensor]:
    """Writes the sparse checkpoint with its marks, which are the same every time."""
    records = sparse.write(folder, NEOX_20B.config(), NEOX_20B.tensors())
    rng = np.random.Generator(np.random.SFC64(0))
    for path, inside in itertools.groupby(records, lambda record: record.file):
        with path.open("r+b", buffering=0) as file:
            for record in inside:
                _mark(file.fileno(), record, rng)
    return records


def _mark(descriptor: int, record: SparseTensor, rng: np.random.Generator) -> None:
    """Writes random bfloat16 from 2⁻⁷ to 2⁻³: eight bytes per step, or all of a small tensor."""
    small = record.size_bytes < _WHOLE_BYTES
    length = record.size_bytes if small else 8
    for start in range(0, record.size_bytes, record.size_bytes if small else _MARK_STEP_BYTES):
        bits = np.frombuffer(rng.bytes(length), np.uint16)
        data = ((bits & 0x81FF) | 0x3C00).tobytes()[: record.size_bytes - start]
        os.pwrite(descriptor, data, record.offset_bytes + start)


def _load(folder: Path, mesh: str, host: int, hosts: int, digests: Path) -> dict:
    """Loads one host's share in its own process."""
    options = ["--mesh", mesh, "--simulate-host", f"{host}/{hosts}", "--digests", str(digests)]
    started = time.perf_counter()
    report = _run("load", str(folder), *options, "--json", "--no-progress")["report"]
    seconds = time.perf_counter() - started
    print(
        f"host {host} of {hosts}: {report['bytes_read']:,} bytes in "
        f"{report['seconds']['load']:.1f} s ({seconds:.1f} s with start, plan and digests), "
        f"peak memory {report['peak_host_bytes'] / 1e9:.2f} GB"
    )
    return {
        "bytes_read": report["bytes_read"],
        "device_bytes": report["device_bytes"],
        "load_seconds": report["seconds"]["load"],
        "process_seconds": seconds,
        "peak_host_bytes": report["peak_host_bytes"],
    }


def _combine(files: list[Path]) -> dict:
    """Runs `mtj-loader digests`, which fails if a shard is missing."""
    return _run("digests", *map(str, files), "--json")


def _run(*arguments: str) -> dict:
    command = [sys.executable, "-m", "mtj_loader.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _compare(found: list[dict], expected: dict[str, dict[str, str]]) -> int:
    """Checks all digests of the hosts; returns their number."""
    pairs = [(n, j, one) for f in found for n, of in f["of"].items() for j, one in of.items()]
    if wrong := [(name, j) for name, j, one in pairs if expected[name][j] != one]:
        raise RuntimeError(f"{len(wrong)} shards differ from numpy's: {wrong[0]}")
    if missing := sum(map(len, expected.values())) - len({(name, j) for name, j, _ in pairs}):
        raise RuntimeError(f"{missing} shards are on no host")
    return len(pairs)


if __name__ == "__main__":
    typer.run(main)
