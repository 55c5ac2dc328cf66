"""One picture: how much of joint training's gain a way to share recovers, for how many bytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.benchmarks.exchanges.rows import ROWS
from toolkit.benchmarks.exchanges.summary import HEADS, Summary

NEEDED = "--plot needs matplotlib: pip install 'gradient-bridge[plot]'"
_COLOURS = {
    "gradient": "tab:blue",
    "delta": "tab:orange",
    "distill": "tab:green",
    "auto": "tab:red",
    "head": "tab:purple",
    "": "tab:gray",
}


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def has_picture(summaries: Sequence[Summary]) -> bool:
    """Whether there is anything to show."""
    return any(s.recovery[head] is not None for s in _sent(summaries) for head in HEADS)


def _sent(summaries: Sequence[Summary]) -> list[Summary]:
    return [summary for summary in summaries if summary.mib and ROWS[summary.row].shares]


def plot(summaries: Sequence[Summary], title: str, path: Path) -> None:
    """Write a PNG with one panel for each head that joint training improves.

    Args:
        summaries: of all rows, which have a picture; those without bytes are left out.
        title: of the picture.
        path: of the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sent = _sent(summaries)
    heads = [head for head in HEADS if any(s.recovery[head] is not None for s in sent)]
    figure = Figure(figsize=(1 + 5.5 * len(heads), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for number, head in enumerate(heads, 1):
        axes: Any = figure.add_subplot(1, len(heads), number)
        _draw(axes, sent, head)
    figure.savefig(path, dpi=150)


def _draw(axes: Any, summaries: Sequence[Summary], head: str) -> None:
    for level, name in ((0, "receiver alone"), (100, "joint training")):
        axes.axhline(level, color="black", linewidth=0.8, linestyle="--")
        axes.annotate(
            name, (0.01, level), xycoords=("axes fraction", "data"), fontsize=8, va="bottom"
        )
    families = dict.fromkeys(ROWS[summary.row].exchange for summary in summaries)
    for family in families:
        rows = [summary for summary in summaries if ROWS[summary.row].exchange == family]
        points = [(summary.mib, summary.recovery[head]) for summary in rows]
        colour = _COLOURS[family]
        axes.plot(*zip(*points, strict=True), "o", color=colour)
        for place, (summary, point) in enumerate(zip(rows, points, strict=True)):
            # To the right and to the left by turns: ways of one exchange lie close together.
            side, shift = ("right", -6) if place % 2 or not family else ("left", 6)
            axes.annotate(
                summary.row, point, xytext=(shift, 4), textcoords="offset points", fontsize=8,
                color=colour, ha=side,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.25, y=0.12)
    axes.set_xlabel("crossed in both directions (MiB)")
    axes.set_ylabel(f"recovered of joint training's gain on {head} (%)")
    axes.grid(alpha=0.3)
