"""All hosts of a pod that is not there, one after the other: `python -m benchmarks.pod`.

GPT-NeoX-20B as a sparse file with marks in it: every host's share is really read and placed, each
in a process of its own, and the digests of all shards are compared with numpy's from the file.
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

from benchmarks import machine, mtj_rule, sparse
from benchmarks.load import RESULTS
from benchmarks.sparse import NEOX_20B, Hole

# Bytes between marks, a prime number of words: so they come at ever other places of the rows, and
# every shard of a weight has some.
_MARK_STEP_BYTES = 8 * 16_381
_WHOLE_BYTES = 1 << 20  # smaller tensors are random throughout
# A disk in memory, where there is one: there a hole costs nothing to read, while the page cache of
# others fills with zeros, 41 GB of them.
_MEMORY = next(filter(Path.is_dir, (Path("/dev/shm"), Path(tempfile.gettempdir()))))


def main(
    *,
    mesh: Annotated[str, typer.Option(help="the pod's mesh")] = "mp=64",
    hosts: Annotated[int, typer.Option(help="hosts that share it; each share has to fit")] = 16,
    scratch: Annotated[Path, typer.Option(help="where 1.3 GB are kept meanwhile")] = _MEMORY,
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = RESULTS,
) -> None:
    """Loads the share of every host, and checks that they make up the whole."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        result = {"machine": machine.facts(), "mesh": mesh, **_measure(Path(folder), mesh, hosts)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "pod.json").write_text(json.dumps(result, indent=1))


def _measure(folder: Path, mesh: str, hosts: int) -> dict:
    """Loads, joins, compares; everything is kept in this folder."""
    begun = time.perf_counter()
    holes = _checkpoint(folder)
    files = [folder / f"digests-{k}.json" for k in range(hosts)]
    rows = [_load(folder, mesh, k, hosts, file) for k, file in enumerate(files)]
    joined = _join(files)
    print(f"{hosts} hosts together: {joined['parameters']} parameters, SHA-256 {joined['sha256']}")
    expected = mtj_rule.digests(holes, joined["shards"])
    equal = _compare([json.loads(file.read_text()) for file in files], expected)
    different = len({one for of in expected.values() for one in of.values()})
    print(f"{equal:,} digests of shards, {different:,} different, are numpy's from the file")
    unique, read = sum(hole.size_bytes for hole in holes), sum(row["bytes_read"] for row in rows)
    print(f"{read:,} bytes read by all hosts, {read / unique:.4f} times those of the tensors")
    return {
        "model": "GPT-NeoX-20B",
        "bytes": unique,
        "bytes_read": read,
        "digests_equal": equal,
        "digests_different": different,
        "seconds": time.perf_counter() - begun,
        **joined,
        "hosts": rows,
    }


def _checkpoint(folder: Path) -> list[Hole]:
    """The sparse checkpoint, with marks; they are the same whenever they are written."""
    holes = sparse.write(folder, NEOX_20B.config(), NEOX_20B.tensors())
    rng = np.random.Generator(np.random.SFC64(0))
    for path, inside in itertools.groupby(holes, lambda hole: hole.file):
        with path.open("r+b", buffering=0) as file:
            for hole in inside:
                _mark(file.fileno(), hole, rng)
    return holes


def _mark(descriptor: int, hole: Hole, rng: np.random.Generator) -> None:
    """Random bfloat16 numbers of 2⁻⁷ up to 2⁻³: eight bytes a step, or all of a small tensor."""
    small = hole.size_bytes < _WHOLE_BYTES
    length = hole.size_bytes if small else 8
    for start in range(0, hole.size_bytes, hole.size_bytes if small else _MARK_STEP_BYTES):
        bits = np.frombuffer(rng.bytes(length), np.uint16)
        data = ((bits & 0x81FF) | 0x3C00).tobytes()[: hole.size_bytes - start]
        os.pwrite(descriptor, data, hole.offset_bytes + start)


def _load(folder: Path, mesh: str, host: int, hosts: int, digests: Path) -> dict:
    """One host's share in a process of its own."""
    options = ["--mesh", mesh, "--simulate-host", f"{host}/{hosts}", "--digests", str(digests)]
    begun = time.perf_counter()
    report = _run("load", str(folder), *options, "--json", "--no-progress")["report"]
    seconds = time.perf_counter() - begun
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


def _join(files: list[Path]) -> dict:
    """What `mtj-loader digests` says: it fails unless every shard is there."""
    return _run("digests", *map(str, files), "--json")


def _run(*arguments: str) -> dict:
    command = [sys.executable, "-m", "mtj_loader.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _compare(found: list[dict], expected: dict[str, dict[str, str]]) -> int:
    """How many digests of the hosts are equal to the expected ones: all, or an error."""
    pairs = [(n, j, one) for f in found for n, of in f["of"].items() for j, one in of.items()]
    if wrong := [(name, j) for name, j, one in pairs if expected[name][j] != one]:
        raise RuntimeError(f"{len(wrong)} shards are not what numpy makes of the file: {wrong[0]}")
    if missing := sum(map(len, expected.values())) - len({(name, j) for name, j, _ in pairs}):
        raise RuntimeError(f"{missing} shards are on no host")
    return len(pairs)


if __name__ == "__main__":
    typer.run(main)
