"""Runs several hosts as processes of this machine, and collects their results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_SECONDS = 240  # for all cases together; a case that hangs is killed long before

Json = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """The results of a case.

    Attributes:
      results: for each host, the result of each step, in order.
      codes: the exit code of each, or minus the signal that killed it.
      logs: the output of each.
    """

    results: tuple[tuple[Json, ...], ...]
    codes: tuple[int, ...]
    logs: tuple[str, ...]

    def step(self, number: int) -> list[Json]:
        """The results of one step on all hosts."""
        return [lines[number] for lines in self.results]


def step(
    paths: Sequence[Path | str],
    options: Json,
    queries: Sequence[str] = (),
    *,
    of_host_1: Json | None = None,
    fault: Json | None = None,
) -> Json:
    """A load, as input of `tests.support.host_program`.

    Args:
      paths: of the checkpoint on each host.
      options: of `mtj_loader.load`.
      queries: keys of `host_program.QUERIES`.
      of_host_1: options of host 1 only.
      fault: as `dict(host=1, phase="read", kind="kill")`.
    """
    return {
        "paths": [str(path) for path in paths],
        "options": [options, options | (of_host_1 or {}), options, options][: len(paths)],
        "queries": list(queries),
        "fault": fault or {},
    }


def run(folder: Path, cases: Mapping[str, tuple[int, Sequence[Json]]]) -> dict[str, Outcome]:
    """Runs cases, each a number of hosts and their steps; no process is left afterwards."""
    listed = [{"name": n, "hosts": hosts, "steps": steps} for n, (hosts, steps) in cases.items()]
    (folder / "cases.json").write_text(json.dumps(listed))
    program = [sys.executable, "-m", "tests.support.host_program", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    subprocess.run(program, cwd=ROOT, env=environment, timeout=_SECONDS, check=True)
    codes = json.loads((folder / "codes.json").read_text())
    return {name: _outcome(folder, name, codes[name]) for name in cases}


def _outcome(folder: Path, name: str, codes: Mapping[str, int]) -> Outcome:
    results, logs = [], []
    for host in range(len(codes)):
        output = folder / f"{name}-{host}.jsonl"
        lines = output.read_text().splitlines() if output.exists() else []
        results.append(tuple(json.loads(line) for line in lines))
        logs.append(output.with_suffix(".log").read_text())
    return Outcome(
        tuple(results), tuple(codes[str(host)] for host in range(len(codes))), tuple(logs)
    )
