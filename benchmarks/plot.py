"""Plots of what was measured, as PNG files."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks import machine

_OURS, _FLOOR, _PEER = "tab:blue", "0.6", "tab:orange"
mpl.rcParams["font.size"] = 9


def bars(result: dict, file: Path) -> None:
    """Seconds of every contender, every single run as a dot."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    names = list(result["medians"])[::-1]  # the first on top
    values = [result["medians"][name] for name in names]
    shown = axes.barh(names, [v["seconds"] for v in values], color=list(map(_color, names)))
    axes.bar_label(shown, [_label(v) for v in values], padding=8)
    for i, name in enumerate(names):
        seconds = [run["seconds"] for run in result["runs"][name]]
        axes.plot(seconds, [i] * len(seconds), ".", color="black", markersize=3)
    axes.set_xlabel("seconds (median; dots are single runs)")
    slowest = max(run["seconds"] for runs in result["runs"].values() for run in runs)
    axes.set_xlim(right=1.25 * slowest)  # room for the labels
    title = f"{result['shape']}, {result['bytes'] / 1e9:.2f} GB, page cache {result['page_cache']}"
    axes.set_title(f"{title}\n{machine.in_words(result['machine'])}", fontsize=6, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def _color(name: str) -> str:
    return _FLOOR if name == "floor" else _OURS if name.startswith("ours") else _PEER


def _label(values: dict) -> str:
    ratio = f", {values['ratio']:.2f} × floor" if "ratio" in values else ""
    return f"{values['seconds']:.2f} s{ratio}"
