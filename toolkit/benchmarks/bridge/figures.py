"""What a part of the measurement has found, as a table and as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

Cell = float | int | str


@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    """One table.

    Attributes:
        title: what was measured.
        rows: by heading, which has the unit.
        goals: by heading, what its numbers are to be at most, or (negative) at least.
        curves: pairs of headings to plot, the second over the first; by the third, where there is
            one, there are several lines.
    """

    title: str
    rows: Sequence[Mapping[str, Cell]]
    goals: Mapping[str, float] = dataclasses.field(default_factory=dict)
    curves: Sequence[tuple[str, str, str]] = ()

    def table(self) -> Table:
        """For a terminal; what misses its goal is marked."""
        table = Table(title=self.title)
        headings = list(dict.fromkeys(heading for row in self.rows for heading in row))
        for heading in headings:
            goal = self.goals.get(heading)
            bound = "" if goal is None else f"\n({'≤' if goal > 0 else '≥'} {abs(goal):g})"
            table.add_column(heading + bound, justify="right", overflow="fold")
        for row in self.rows:
            table.add_row(*(self._cell(heading, row.get(heading, "")) for heading in headings))
        return table

    def _cell(self, heading: str, value: Cell) -> str:
        if isinstance(value, str):
            return value
        text = f"{value:,.0f}" if isinstance(value, int) or value >= 100 else f"{value:.3g}"
        return f"[bold red]{text}[/]" if self.misses(heading, value) else text

    def misses(self, heading: str, value: float) -> bool:
        """Whether a number is not what it is to be."""
        goal = self.goals.get(heading)
        return goal is not None and (value > goal if goal > 0 else value < -goal)


def plot(parts: Sequence[Figures], title: str, path: Path) -> None:
    """Write a PNG with a panel for every curve of every part.

    Args:
        parts: what was measured.
        title: of the picture.
        path: of the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(part, curve) for part in parts for curve in part.curves]
    num_rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(12, 3.6 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    all_axes: Any = figure.subplots(num_rows, 2, squeeze=False)
    for axes, (part, (over, what, by)) in zip(all_axes.flat, panels, strict=False):
        for name in dict.fromkeys(row.get(by, "") for row in part.rows):
            rows = [row for row in part.rows if row.get(by, "") == name and what in row]
            points = sorted((float(row[over]), float(row[what])) for row in rows)
            axes.plot(*zip(*points, strict=True), marker="o", label=str(name))
        if (goal := part.goals.get(what)) is not None:
            axes.axhline(abs(goal), linestyle="--", color="tab:gray", label="goal")
        axes.set_xscale("log")
        axes.set_xlabel(over)
        axes.set_ylabel(what)
        axes.set_title(part.title, fontsize="medium")
        if by or what in part.goals:
            axes.legend()
    for axes in all_axes.flat[len(panels) :]:
        axes.remove()
    figure.savefig(path, dpi=110)
