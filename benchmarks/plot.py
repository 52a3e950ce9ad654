"""Plots of the results as PNG files."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks import machine

_OURS, _FLOOR, _PEER = "tab:blue", "0.6", "tab:orange"
mpl.rcParams["font.size"] = 9


def bars(result: dict, file: Path) -> None:
    """Plots the seconds of every loader; each run is a dot."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    names = list(result["medians"])[::-1]  # the first at the top
    values = [result["medians"][name] for name in names]
    axes.barh(names, [v["seconds"] for v in values], color=list(map(_color, names)))
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        seconds = [run["seconds"] for run in result["runs"][name]]
        axes.plot(seconds, [i] * len(seconds), ".", color="black", markersize=3)
        axes.annotate(_label(value), (max(seconds), i), (8, -3), textcoords="offset points")
    axes.set_xlabel("seconds (median; dots are single runs)")
    slowest = max(run["seconds"] for runs in result["runs"].values() for run in runs)
    axes.set_xlim(right=1.25 * slowest)  # room for the labels
    title = f"{result['shape']}, {result['bytes'] / 1e9:.2f} GB, page cache {result['page_cache']}"
    caption = textwrap.fill(machine.describe(result["machine"]), 130)
    axes.set_title(f"{title}\n{caption}", fontsize=6, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def scaling(results: list[dict], file: Path) -> None:
    """Plots seconds (page cache warm) and memory beyond the parameters by checkpoint size."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    results = sorted(results, key=lambda result: result["bytes"])
    time, memory = figure.subplots(1, 2)
    for name, style in (("floor", "k--o"), *_LINES.items()):
        found = [r for r in results if name in r["medians"]]
        warm = [r for r in found if r["page_cache"] == "warm"]
        seconds = [r["medians"][name]["seconds"] for r in warm]
        time.plot([r["bytes"] / 1e9 for r in warm], seconds, style, label=name)
        extra = [r["medians"][name]["extra_bytes"] / 1e6 for r in found]
        memory.plot([r["bytes"] / 1e9 for r in found], extra, style, label=name)
    time.set_ylabel("seconds (page cache warm)")
    memory.set_ylabel("MB beyond the parameters")
    for axes in (time, memory):
        axes.set(xlabel="checkpoint, GB", xlim=(0, None), ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    time.legend(frameon=False)
    figure.savefig(file, dpi=150)


_LINES = {"ours, transposed_linear": "C0-o", "ours, transposes": "C0:o"}


def _color(name: str) -> str:
    return _FLOOR if name == "floor" else _OURS if name.startswith("ours") else _PEER


def _label(values: dict) -> str:
    ratio = f", {values['ratio']:.2f} × floor" if "ratio" in values else ""
    return f"{values['seconds']:.2f} s{ratio}"
