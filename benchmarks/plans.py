"""Planning time for large pods: `python -m benchmarks.plans`.

The headers are real and are parsed as usual; the tensors are holes in sparse files. Each run has
its own process and counts everything from reading the index to the last byte range of a host.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import machine, sparse
from benchmarks.checkpoint import Mixture
from benchmarks.sparse import NEOX_20B

STAGES = ("headers", "plan", "hosts", "runs")


@dataclass(frozen=True)
class Case:
    """A model, a pod, and the target for planning time."""

    config: dict[str, object]
    tensors: Iterator[tuple[str, sparse.Dims]]
    mesh: str
    hosts: int  # with four devices each, as on v4 and v5p
    expert_parallel: bool
    bar_seconds: float


# Larger than any published mixture of experts.
_MIXTURE = Mixture(59, 512, d_model=4096, d_ff=1536, heads=64, kv_heads=8, vocab_size=128256)


def cases() -> dict[str, Case]:
    """The cases by name."""
    neox, moe = NEOX_20B.config(), _MIXTURE.config()
    return {
        "GPT-NeoX-20B": Case(neox, NEOX_20B.tensors(), "dp=4,mp=64", 64, False, 1.0),
        "MoE, experts split": Case(moe, _MIXTURE.tensors(), "dp=8,mp=64", 128, False, 10.0),
        "MoE, experts dealt": Case(moe, _MIXTURE.tensors(), "dp=8,mp=64", 128, True, 10.0),
    }


def main(
    *,
    runs: Annotated[int, typer.Option(help="runs of each case; medians are shown")] = 5,
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = Path("benchmarks/results"),
    probe: Annotated[str, typer.Option(hidden=True, help="case to plan in this process")] = "",
    folder: Annotated[Path, typer.Option(hidden=True, help="its checkpoint")] = Path(),
) -> None:
    """Prints seconds for each stage, and writes them as JSON."""
    if probe:
        print(json.dumps(measure_plan(cases()[probe], folder)))
        return
    rows = [_measure(name, case, runs) for name, case in cases().items()]
    for row in rows:
        stages = ", ".join(f"{stage} {row['medians'][stage]:.2f}" for stage in STAGES)
        print(
            f"{row['case']}: {row['tensors']:,} tensors, {row['devices']} devices, {row['hosts']} "
            f"hosts: {row['medians']['total']:.2f} s of {row['bar_seconds']:.0f} ({stages}; "
            f"processor {row['medians']['processor']:.2f})"
        )
    out.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine.facts(), "plans": rows}
    (out / "plans.json").write_text(json.dumps(result, indent=1))


def _measure(name: str, case: Case, runs: int) -> dict:
    """Medians over processes."""
    with tempfile.TemporaryDirectory() as folder:
        sparse.write(Path(folder), case.config, case.tensors)
        command = [sys.executable, "-m", "benchmarks.plans", "--probe", name, "--folder", folder]
        found = [
            json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            for _ in range(runs)
        ]
    keys = found[0]["seconds"]
    medians = {key: statistics.median(run["seconds"][key] for run in found) for key in keys}
    facts = {"case": name, "mesh": case.mesh, "bar_seconds": case.bar_seconds, "medians": medians}
    return facts | found[0]["counts"] | {"seconds": [run["seconds"] for run in found]}


def measure_plan(case: Case, folder: Path) -> dict[str, dict]:
    """The seconds of each stage, and counts of the result."""
    import mtj_loader  # noqa: PLC0415 -- imports are not measured
    from mtj_loader.formats.checkpoint import open_checkpoint  # noqa: PLC0415
    from mtj_loader.options import LoadOptions, Source  # noqa: PLC0415
    from mtj_loader.planning.planner import make_plan, read_model  # noqa: PLC0415

    mesh = mtj_loader.make_abstract_mesh(case.mesh, case.hosts)
    cpu_seconds, marks = time.process_time(), [time.perf_counter()]
    checkpoint = open_checkpoint(Source(folder))  # reads, parses and checks index and headers
    marks.append(time.perf_counter())
    options = LoadOptions(expert_parallel=case.expert_parallel)
    model = read_model(checkpoint)  # config and map
    plan = make_plan(checkpoint, model, mesh, options)  # views, layout of every shard
    marks.append(time.perf_counter())
    host_bytes = plan.bytes_of_hosts
    marks.append(time.perf_counter())
    runs = _runs(plan, case.hosts // 2)
    marks.append(time.perf_counter())
    cpu_seconds = time.process_time() - cpu_seconds
    stages = [stop - start for start, stop in itertools.pairwise(marks)]
    total = {"total": marks[-1] - marks[0], "processor": cpu_seconds}
    return {
        "seconds": dict(zip(STAGES, stages, strict=True)) | total,
        "counts": {
            "tensors": len(checkpoint.index.records),
            "devices": mesh.dp * mesh.mp,
            "hosts": len(host_bytes),
            "bytes_of_all_hosts": sum(host_bytes.values()),
            "runs_of_a_host": runs,
        },
    }


def _runs(plan, host: int) -> int:
    """The number of contiguous ranges that a host reads; computes every range."""
    from mtj_loader.loading.schedule import list_targets  # noqa: PLC0415

    targets = list_targets(plan, host, None)
    return sum(len(read.runs) for target in targets for read in target.reads)


if __name__ == "__main__":
    typer.run(main)
