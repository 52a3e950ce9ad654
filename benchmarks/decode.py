"""Decoding and time to first token against other programs: `python -m benchmarks.decode`.

Every program runs in a process of its own that stays, and the processes take turns: while one
measures, the others wait for their next command.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.checkpoint import SHAPES, checkpoint
from benchmarks.load import CACHE, RESULTS

# Name → "module:function" that starts it, and the libraries it needs.
DECODERS = {
    "ours": ("ours:start", ()),
    "ours, transposed_linear": ("ours:start_transposed_linear", ()),
    "transformers": ("torch_model:start", ("torch", "transformers")),
    "llama.cpp": ("llama_cpp_model:start", ("llama_cpp", "gguf")),
}
_LIMIT = "limit"  # not a decoder: the time that reading and multiplying take
_OURS = ("ours", "ours, transposed_linear")
_TORCH = "transformers"
_VOCAB = 50_000  # prompts use ids below it; all shapes have them

Run = dict[str, object]


def main(
    *,
    shape: Annotated[str, typer.Option(help=f"one of {', '.join(SHAPES)}")] = "pythia-160m",
    batches: Annotated[str, typer.Option(help="numbers of rows")] = "1,4,16",
    prompts: Annotated[str, typer.Option(help="numbers of tokens in the prompts")] = "16,512",
    new: Annotated[int, typer.Option(help="new tokens of each row")] = 33,
    runs: Annotated[int, typer.Option(help="timed runs of each; medians are shown")] = 3,
    only: Annotated[str, typer.Option(help='names, for example "ours,transformers"')] = "",
    cache: Annotated[Path, typer.Option(help="where synthetic checkpoints are kept")] = CACHE,
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = RESULTS,
    worker: Annotated[str, typer.Option(hidden=True, help="what this process measures")] = "",
) -> None:
    """Measures every program at every point, in turn; prints a table and writes JSON."""
    folder = checkpoint(shape, cache)
    lengths = [int(n) for n in prompts.split(",")]
    if worker:
        _serve(worker, folder, max(lengths) + new)
        return
    names = [name for name in DECODERS if _installed(name) and (not only or name in _list(only))]
    options = ["--shape", shape, "--prompts", prompts, "--new", str(new), "--cache", str(cache)]
    points, console = [], Console()
    with ExitStack() as stack:
        workers = {name: stack.enter_context(_Worker(name, options)) for name in [*names, _LIMIT]}
        for length in lengths:
            for batch in map(int, batches.split(",")):
                point = _measure(workers, batch, length, new, runs)
                points.append(point)
                console.print(_table([point]))
    facts = {"shape": shape, "new_tokens": new, "machine": machine.facts(), "points": points}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"decode-{shape}.json").write_text(json.dumps(facts, indent=1))
    console.print(_table(points, title=f"{shape}, {machine.describe(facts['machine'])}"))


class _Worker:
    """A process with one program; `measure` is a question and its answer."""

    def __init__(self, name: str, options: Sequence[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.decode", "--worker", name, *options]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._stdout.readline()  # it is ready

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stdin.close()
        self._process.wait()

    def measure(self, **question: int) -> Run:
        print(json.dumps(question), file=self._stdin, flush=True)
        return json.loads(self._stdout.readline())


def _serve(name: str, folder: Path, context: int) -> None:
    """Answers questions until stdin ends."""
    module, function = DECODERS.get(name, ("limit:start",))[0].split(":")
    start = getattr(importlib.import_module(f"benchmarks.decoders.{module}"), function)
    measure = start(folder, context)
    print("ready", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        if name == _LIMIT:
            answer = measure(question["batch"])
        else:
            rng = np.random.default_rng(question["seed"])
            shape = question["batch"], question["length"]
            ids = rng.integers(1, _VOCAB, shape).tolist()
            answer = measure(ids, question["new"]).as_dict()
        print(json.dumps(answer), flush=True)


def _measure(
    workers: dict[str, _Worker], batch: int, length: int, new: int, runs: int
) -> dict[str, object]:
    """One point: an untimed run of each program, and then timed ones in turn.

    Every run has prompts of its own, so that no program can reuse keys and values.
    """
    found: dict[str, list[Run]] = {name: [] for name in workers}
    for seed in range(runs + 1):
        for name, worker in workers.items():
            run = worker.measure(batch=batch, length=length, new=new, seed=seed)
            found[name].append(run)
    limits = found.pop(_LIMIT)
    limit = {key: min(run[key] for run in limits) for key in limits[0]}
    timed = {name: several[1:] for name, several in found.items()}
    return {
        "batch": batch,
        "prompt_tokens": length,
        "limit": limit | {"step": max(limit.values()) if batch >= 16 else limit["read"]},
        "medians": {
            name: {k: statistics.median(run[k] for run in several) for k in ("first_token", "step")}
            for name, several in timed.items()
        },
        "equal_first_tokens": _equal(found),
        "load_average": os.getloadavg()[0],
        "runs": timed,
    }


def _equal(found: dict[str, list[Run]]) -> dict[str, float]:
    """The share of the compared tokens at which each program agrees with the first one."""
    first, *others = found
    shares = {}
    for name in others:
        pairs = [
            a == b
            for mine, theirs in zip(found[first], found[name], strict=True)
            for a, b in zip(mine["ids"], theirs["ids"], strict=True)
        ]
        shares[name] = sum(pairs) / len(pairs)
    return shares


def _table(points: Sequence[dict], title: str | None = None) -> Table:
    grid = Table(title=title)
    for column in _COLUMNS:
        grid.add_column(column, justify="right")
    for point in points:
        medians, batch = point["medians"], point["batch"]
        torch = medians.get(_TORCH)
        for name, run in medians.items():
            grid.add_row(
                f"{batch} × {point['prompt_tokens']}",
                name,
                f"{batch / run['step']:.1f}",
                f"{run['step'] * 1e3:.1f}",
                f"{point['limit']['step'] / run['step']:.2f}",
                f"{torch['step'] / run['step']:.2f}" if torch else "",
                f"{run['first_token'] * 1e3:.0f}",
                f"{torch['first_token'] / run['first_token']:.2f}" if torch else "",
            )
    return grid


_COLUMNS = (
    "batch × prompt",
    "program",
    "tokens/s",
    "ms a step",
    "limit ÷ step",
    "× transformers",
    "first token, ms",
    "× transformers",
)


def _installed(name: str) -> bool:
    return all(map(importlib.util.find_spec, DECODERS[name][1]))


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


if __name__ == "__main__":
    typer.run(main)
