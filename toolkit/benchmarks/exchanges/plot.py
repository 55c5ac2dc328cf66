"""One picture: the accuracies of every way to share, and of alone and joint training."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.benchmarks.exchanges.rows import ALONE, JOINT, ROWS
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
_LEFT_MARGIN = 0.4  # of the range from alone to joint, shown below; what is lower gets an arrow


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(summaries: Sequence[Summary], title: str, path: Path) -> None:
    """Write a PNG with one panel for each head: a dot for each seed, a line for their mean.

    Args:
        summaries: of all rows.
        title: of the picture.
        path: of the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.6 + 0.26 * len(summaries)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    all_axes: Any = figure.subplots(1, len(HEADS), sharey=True)
    for axes, head in zip(all_axes, HEADS, strict=True):
        _draw(axes, summaries, head)
    all_axes[0].set_yticks(range(len(summaries)), [_label(summary) for summary in summaries])
    all_axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)


def _label(summary: Summary) -> str:
    crossed = f" ({summary.mib:.3g} MiB)" if summary.mib and ROWS[summary.row].shares else ""
    return summary.row + crossed


def _draw(axes: Any, summaries: Sequence[Summary], head: str) -> None:
    means = {summary.row: statistics.mean(summary.accuracies[head]) for summary in summaries}
    references = [means[row] for row in (ALONE, JOINT) if row in means]
    for reference in references:
        axes.axvline(reference, color="black", linewidth=0.8, linestyle="--")
    lowest = min([value for s in summaries for value in s.accuracies[head]])
    if len(references) == 2:
        of_references = [
            v for s in summaries if s.row in (ALONE, JOINT) for v in s.accuracies[head]
        ]
        spread = max(of_references) - min(of_references)
        lowest = max(lowest, min(of_references) - _LEFT_MARGIN * spread)
    for place, summary in enumerate(summaries):
        colour = _COLOURS[ROWS[summary.row].exchange]
        values = summary.accuracies[head]
        shown = [value for value in values if value >= lowest]
        axes.plot(shown, [place] * len(shown), "o", color=colour, alpha=0.4, markersize=5)
        mean = means[summary.row]
        if mean >= lowest:
            axes.plot([mean], [place], "|", color=colour, markersize=14, markeredgewidth=2.5)
        else:
            axes.annotate(
                f"◀ {mean:.0f}", (0.01, place), xycoords=("axes fraction", "data"), color=colour,
                va="center",
            )  # fmt: skip
    axes.set_xlabel(f"{head}, accuracy (%)")
    axes.grid(alpha=0.3)
