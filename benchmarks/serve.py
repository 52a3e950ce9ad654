"""Many requests on one engine: `python -m benchmarks.serve`.

Requests arrive at random, with lengths and settings of their own, in a process in which everything
is compiled. They are compared with the same requests one at a time, with all of them at once, and
with a batch of 16 rows of equal length, which is always full. Then: what a long prompt costs those
who read along, and what a kept story saves.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import machine
from benchmarks.checkpoint import SHAPES, checkpoint
from benchmarks.engines import SLOTS, load_engine
from benchmarks.load import CACHE, RESULTS
from mtj_loader.generation.row_output import TextPiece
from mtj_loader.model import Model

_CONTEXT = 2048
_VOCAB = 50_000  # prompts use ids below it; all shapes have them
_PROMPT, _NEW = (16, 256), (32, 256)  # tokens of requests, least and most
_STORY = 1_500  # tokens
_ADDED = 20  # tokens that continue a story
_BEFORE, _AFTER = 40, 20  # tokens of the stream before and after a long prompt

# Requests take these in turn.
_SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.1},
    {"temperature": 0.7, "top_k": 40, "seed": 7},
)


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
      arrival: seconds after the start.
      prompt: token ids.
      settings: of the samplers, and the number of new tokens.
    """

    arrival: float
    prompt: list[int]
    settings: dict[str, Any]

    @property
    def new(self) -> int:
        return self.settings["max_new_tokens"]


@dataclass(frozen=True)
class Times:
    """When a request got its first and last token, in seconds after the start."""

    arrival: float
    first: float
    end: float


def main(
    *,
    shape: Annotated[str, typer.Option(help=f"one of {', '.join(SHAPES)}")] = "pythia-160m",
    requests: Annotated[int, typer.Option(help="how many arrive")] = SLOTS,
    spread: Annotated[
        float, typer.Option(help="the mean time of all arrivals ÷ the time of the full batch")
    ] = 0.25,
    runs: Annotated[int, typer.Option(help="runs of everything; medians are shown")] = 3,
    cache: Annotated[Path, typer.Option(help="where synthetic checkpoints are kept")] = CACHE,
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = RESULTS,
) -> None:
    """Measures everything `runs` times, in turn; prints medians and writes JSON."""
    model = load_engine(checkpoint(shape, cache), _CONTEXT)
    found = [_measure(model, requests, spread, seed) for seed in range(runs)]
    medians = {
        name: {key: statistics.median(run[name][key] for run in found) for key in values}
        for name, values in found[0].items()
    }
    facts = {"shape": shape, "requests": requests, "spread": spread, "machine": machine.facts()}
    print(json.dumps(medians, indent=1))
    out.mkdir(parents=True, exist_ok=True)
    result = facts | {"medians": medians, "runs": found}
    (out / f"serve-{shape}.json").write_text(json.dumps(result, indent=1))


def _measure(model: Model, count: int, spread: float, seed: int) -> dict[str, dict[str, float]]:
    """Everything once. Every part has prompts of its own, so that no slot holds them already."""
    rng = np.random.default_rng(seed)
    found: dict[str, dict[str, float]] = {}

    def note(name: str, values: dict[str, float]) -> dict[str, float]:
        for other in ("full batch", "at once") if name.startswith("arriving") else ():
            ratio = values["tokens_per_second"] / found[other]["tokens_per_second"]
            values[f"throughput ÷ {other}"] = ratio
        print(f"{name}: {json.dumps(values)}", flush=True)
        found[name] = values
        return values

    full = note("full batch", _run(model, _equal(rng, count)))
    mean_gap = spread * full["seconds"] / count
    note("at once", _run(model, _arriving(rng, count, 0)))
    note("arriving", _run(model, _arriving(rng, count, mean_gap)))
    note("arriving, streamed", _run(model, _arriving(rng, count, mean_gap), streamed=True))
    note("arriving, one at a time", _run_alone(model, _arriving(rng, count, mean_gap)))
    note("stream beside a prompt", _measure_gaps(model, rng))
    note("story", _measure_story(model, rng))
    note("load", {"average": os.getloadavg()[0]})
    return found


def _arriving(rng: np.random.Generator, count: int, mean_gap: float) -> list[Request]:
    """A Poisson process; the lengths are evenly spread, so that each run has as many tokens."""
    arrivals = np.cumsum(rng.exponential(mean_gap, count)) if mean_gap else np.zeros(count)
    lengths = [rng.permutation(np.linspace(*each, count).astype(int)) for each in (_PROMPT, _NEW)]
    return [
        Request(
            float(arrival),
            _prompt(rng, prompt),
            {**_SETTINGS[i % len(_SETTINGS)], "max_new_tokens": int(new)},
        )
        for i, (arrival, prompt, new) in enumerate(zip(arrivals, *lengths, strict=True))
    ]


def _equal(rng: np.random.Generator, count: int) -> list[Request]:
    """Requests of the same mean lengths that all begin and end together."""
    prompt, new = (sum(each) // 2 for each in (_PROMPT, _NEW))
    return [
        replace(request, prompt=_prompt(rng, prompt), settings=settings)
        for request in _arriving(rng, count, 0)
        for settings in [{**request.settings, "max_new_tokens": new}]
    ]


def _prompt(rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(1, _VOCAB, length).tolist()


def _run(model: Model, requests: Sequence[Request], *, streamed: bool = False) -> dict[str, float]:
    """Runs requests from a thread each, as they arrive."""
    times: list[Times] = []
    started = time.perf_counter()

    def run(request: Request) -> None:
        time.sleep(max(0.0, request.arrival - (time.perf_counter() - started)))
        times.append(_time(model, request, started, streamed=streamed))

    threads = [threading.Thread(target=run, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _summarize(requests, times)


def _run_alone(model: Model, requests: Sequence[Request]) -> dict[str, float]:
    """Runs one request after the other; the others wait."""
    times, started = [], time.perf_counter()
    for request in requests:
        time.sleep(max(0.0, request.arrival - (time.perf_counter() - started)))
        times.append(_time(model, request, started))
    return _summarize(requests, times)


def _time(model: Model, request: Request, started: float, *, streamed: bool = False) -> Times:
    seen = [time.perf_counter() - started for _ in _pieces(model, request, streamed=streamed)]
    return Times(request.arrival, seen[0], seen[-1])


def _pieces(model: Model, request: Request, *, streamed: bool) -> Iterator[TextPiece]:
    return model.start(request.prompt, streamed=streamed, **request.settings).pieces


def _summarize(requests: Sequence[Request], times: Sequence[Times]) -> dict[str, float]:
    waits = [each.first - each.arrival for each in times]
    seconds = max(each.end for each in times) - min(each.arrival for each in times)
    return {
        "seconds": seconds,
        "tokens_per_second": sum(request.new for request in requests) / seconds,
        "first_token_p50": float(np.percentile(waits, 50)),
        "first_token_p99": float(np.percentile(waits, 99)),
    }


def _measure_gaps(model: Model, rng: np.random.Generator) -> dict[str, float]:
    """The gaps between tokens of a stream, usually and while a long prompt is prefilled."""
    story = Request(0, _prompt(rng, _STORY), {"temperature": 0, "max_new_tokens": 1})
    alone = _first_token(model, story)
    story = replace(story, prompt=_prompt(rng, _STORY))
    reader = Request(0, _prompt(rng, 16), {"temperature": 0, "max_new_tokens": _CONTEXT - 16})
    done: list[float] = []

    def run_story() -> None:
        done.append(_first_token(model, story))

    thread, seen, count = threading.Thread(target=run_story), [], 0
    pieces = _pieces(model, reader, streamed=True)
    for _ in pieces:
        seen.append(time.perf_counter())
        if len(seen) == _BEFORE:
            thread.start()
        count += bool(done)
        if count == _AFTER:
            break
    pieces.close()  # pyright: ignore[reportAttributeAccessIssue]
    thread.join()
    gaps = np.diff(seen)
    usual = np.concatenate([gaps[4 : _BEFORE - 1], gaps[-_AFTER + 1 :]])
    beside = gaps[_BEFORE:-_AFTER]
    return {
        "usual_gap": float(np.median(usual)),
        "gap": float(np.median(beside)),
        "gap_p90": float(np.percentile(beside, 90)),
        "longest_gap": float(max(beside)),
        "gap ÷ usual": float(np.median(beside) / np.median(usual)),
        "first_token": done[0],
        "first_token_alone": alone,
    }


def _measure_story(model: Model, rng: np.random.Generator) -> dict[str, float]:
    """The first token after a story that a slot holds, and after one that none holds."""
    settings = {"temperature": 0, "max_new_tokens": _ADDED}
    story = Request(0, _prompt(rng, _STORY), settings)
    reply = [token for piece in _pieces(model, story, streamed=True) for token in piece.ids]
    kept = story.prompt + reply + _prompt(rng, _ADDED)
    continued = _first_token(model, replace(story, prompt=kept))
    full = _first_token(model, replace(story, prompt=_prompt(rng, len(kept))))
    return {"continued": continued, "full": full, "continued ÷ full": continued / full}


def _first_token(model: Model, request: Request) -> float:
    """Seconds until the first token; the request then ends."""
    started = time.perf_counter()
    pieces = _pieces(model, request, streamed=True)
    next(pieces)
    seconds = time.perf_counter() - started
    pieces.close()  # pyright: ignore[reportAttributeAccessIssue]
    return seconds


if __name__ == "__main__":
    typer.run(main)
