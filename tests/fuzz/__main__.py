"""Runs thousands of malformed inputs: `python -m tests.fuzz`, or `make fuzz`.

Variants run in worker processes; one that ends its process, or takes too long, is a failure, and
the rest goes on in a new process. With torch installed (the `parity` extra), what is loaded is
compared with transformers, PEFT and torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import typer

_SECONDS = 300  # of one variant; the slowest need a few, on a busy machine ten times that
_TARGETS = ("config", "adapter-config", "adapter-tensors", "pickle", "index", "tokenizer")


def main(
    *,
    variants: Annotated[int, typer.Option(help="in all, shared by the targets")] = 6_000,
    seed: Annotated[int, typer.Option(help="another seed makes other variants")] = 0,
    only: Annotated[str, typer.Option(help=f"a target: {', '.join(_TARGETS)}")] = "",
    number: Annotated[int, typer.Option(help="run this variant alone")] = -1,
    workers: Annotated[int, typer.Option(help="processes")] = os.cpu_count() or 1,
) -> None:
    """Runs the variants; prints failures and a count; exit code 1 if there are any."""
    names = [name for name in _TARGETS if only in ("", name)]
    each = -(-variants // len(names))
    numbers = range(each) if number < 0 else range(number, number + 1)
    parts = [(name, seed, numbers[i::workers]) for name in names for i in range(workers)]
    counts: Counter[tuple[str, str]] = Counter()
    with ThreadPoolExecutor(workers) as pool:
        for results in pool.map(lambda part: list(_run_part(*part)), parts):
            for name, n, outcome in results:
                counts[name, outcome["kind"]] += 1
                if outcome["kind"] == "failed":
                    print(f"--- {name} --seed {seed} --number {n}\n{outcome['detail']}")
    for (name, kind), count in sorted(counts.items()):
        print(f"{name:16} {kind:8} {count:6}")
    failed = sum(count for (_, kind), count in counts.items() if kind == "failed")
    print(f"{sum(counts.values())} variants, {failed} failed")
    sys.exit(failed > 0)


def _run_part(name: str, seed: int, numbers: range) -> Iterator[tuple[str, int, dict[str, str]]]:
    """Runs variants of a target, in as many processes as it takes."""
    while numbers:
        command = [sys.executable, "-m", "tests.fuzz.worker", name, str(seed)]
        command += [str(numbers.start), str(numbers.stop), str(numbers.step)]
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as worker:
                for n, outcome in _read(worker):
                    yield name, n, outcome
                    numbers = numbers[numbers.index(n) + 1 :]
            if numbers:  # it ended before its last variant
                log.seek(0)
                detail = f"the process ended with {worker.returncode}\n{log.read()[-2000:]}"
                yield name, numbers[0], {"kind": "failed", "detail": detail}
                numbers = numbers[1:]


def _read(worker: subprocess.Popen[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The outcomes that a worker prints, until it ends or one takes too long."""
    assert worker.stdout is not None
    while True:
        timer = threading.Timer(_SECONDS, worker.kill)
        timer.start()
        line = worker.stdout.readline()
        timer.cancel()
        if not line:
            return
        n, outcome = json.loads(line)
        yield n, outcome


if __name__ == "__main__":
    typer.run(main)
