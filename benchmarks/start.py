"""Time to the first token compared with load and compilation: `python -m benchmarks.start`.

Every figure comes from its own process, and the measurements take turns. The clock starts after
imports and after JAX has its devices; planning counts.
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

import typer

from benchmarks import machine
from benchmarks.checkpoint import SHAPES, checkpoint
from benchmarks.interleaved import DEVICES, drop_page_cache
from benchmarks.load import CACHE, RESULTS

Run = dict[str, float]


def main(
    *,
    shape: Annotated[str, typer.Option(help=f"one of {', '.join(SHAPES)}")] = "pythia-410m",
    prompt: Annotated[int, typer.Option(help="number of tokens in the prompt")] = 16,
    runs: Annotated[int, typer.Option(help="runs of each; medians are shown")] = 5,
    cold: Annotated[bool, typer.Option(help="drop the files from the page cache first")] = False,
    cache: Annotated[Path, typer.Option(help="where synthetic checkpoints are kept")] = CACHE,
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = RESULTS,
    probe: Annotated[str, typer.Option(hidden=True, help="what to measure in this process")] = "",
) -> None:
    """Measures with an empty compilation cache, and again with a filled one."""
    folder = checkpoint(shape, cache)
    if probe:
        print(json.dumps(_probe(probe, folder, prompt)))
        return

    def measure(name: str, programs: Path) -> Run:
        if cold:
            drop_page_cache(folder)
        return _run(name, ["--shape", shape, "--prompt", str(prompt), "--cache", cache], programs)

    result = {
        "shape": shape,
        "prompt_tokens": prompt,
        "page_cache": "cold" if cold else "warm",
        "machine": machine.facts(),
        "compilation_cache": {
            "empty": _compare(measure, runs, filled=False),
            "filled": _compare(measure, runs, filled=True),
        },
    }
    for state, found in result["compilation_cache"].items():
        print(f"compilation cache {state}:{_describe(found)}")
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"start{'-cold' if cold else ''}.json"
    file.write_text(json.dumps(result, indent=1))


def _compare(measure: Callable[[str, Path], Run], runs: int, *, filled: bool) -> dict:
    """Runs all probes in turn; returns their medians and the ratio of interest."""
    found: dict[str, list[Run]] = {name: [] for name in _PROBES}
    with tempfile.TemporaryDirectory() as programs:
        if filled:
            measure("first token, warmed up", Path(programs))
        for i in range(runs):
            for name in _PROBES:
                folder = Path(programs) / ("shared" if filled else f"{name} {i}")
                found[name].append(measure(name, Path(programs) if filled else folder))
    medians = {
        f"{name}: {key}": statistics.median(run[key] for run in several)
        for name, several in found.items()
        for key in several[0]
    }
    longer = max(medians["load: seconds"], medians["compile: seconds"])
    ratio = medians["first token, warmed up: first_token"] / longer
    return {"medians": medians, "first_token_over_the_longer": ratio, "runs": found}


def _describe(found: dict) -> str:
    lines = [f"{value:7.2f} s  {name}" for name, value in found["medians"].items()]
    ratio = found["first_token_over_the_longer"]
    return "\n  ".join(
        ["", *lines, f"{ratio:7.2f}    first token ÷ the longer of load and compile"]
    )


def _run(name: str, options: list[object], programs: Path) -> Run:
    """Runs a probe in a new process that keeps its compiled programs in `programs`."""
    command = [sys.executable, "-m", "benchmarks.start", "--probe", name, *map(str, options)]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "XDG_CACHE_HOME": str(programs),
    }
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _probe(name: str, folder: Path, prompt: int) -> Run:
    """Runs one probe in this new process."""
    from benchmarks.measure import warm_memory, warm_mesh  # noqa: PLC0415 -- only probes need JAX

    mesh = warm_mesh(folder)
    warm_memory(sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    return _PROBES[name](folder, mesh, prompt)


def _load(folder: Path, mesh: object, prompt: int) -> Run:
    from mtj_loader import load  # noqa: PLC0415

    started = time.perf_counter()
    load(folder, mesh, progress=False)
    return {"seconds": time.perf_counter() - started}


def _compile(folder: Path, mesh: object, prompt: int) -> Run:
    """Compiles what `warm_up` compiles, and does nothing else."""
    import mtj_loader  # noqa: PLC0415
    from mtj_loader.dtypes import parameter_dtype  # noqa: PLC0415
    from mtj_loader.engine.cache_memory import default_limit  # noqa: PLC0415
    from mtj_loader.engine.compilation_cache import enable_compilation_cache  # noqa: PLC0415
    from mtj_loader.engine.compile_ahead import (  # noqa: PLC0415
        compile_in_background,
        keys_for,
        sizes_for,
    )
    from mtj_loader.engine.engine_programs import Programs  # noqa: PLC0415
    from mtj_loader.engine.sizes import Sizes  # noqa: PLC0415
    from mtj_loader.models.forward import Forward  # noqa: PLC0415

    enable_compilation_cache()
    plan = mtj_loader.plan(folder, mesh)
    forward = Forward(plan.config, mesh, False, parameter_dtype("auto"))
    started = time.perf_counter()
    shapes = [(1, prompt, 64)]
    limit = default_limit(forward, plan.config.max_positions)
    sizes = sizes_for(shapes, Sizes(1, 1, 1), limit)
    programs = Programs(forward, plan.abstract_params(mesh))
    with compile_in_background(programs, sizes, keys_for(shapes, sizes)) as first_compiled:
        compiled = first_compiled()
        compiled.wait()
    return {"seconds": time.perf_counter() - started, "first": compiled.end - started}


def _text(folder: Path, mesh: object, prompt: int, warm_up: list[tuple[int, int]]) -> Run:
    from mtj_loader import load  # noqa: PLC0415

    started = time.perf_counter()
    model = load(folder, mesh, progress=False, warm_up=warm_up)
    tokens = model.stream([1] * prompt)
    next(tokens)
    first = time.perf_counter() - started
    next(tokens)
    return {"first_token": first, "second_token": time.perf_counter() - started}


_PROBES: dict[str, Callable[[Path, object, int], Run]] = {
    "load": _load,
    "compile": _compile,
    "first token, warmed up": lambda *given: _text(*given, warm_up=[(1, given[-1])]),
    "first token, one after the other": lambda *given: _text(*given, warm_up=[]),
}


if __name__ == "__main__":
    typer.run(main)
