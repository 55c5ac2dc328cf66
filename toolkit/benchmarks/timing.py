"""Timing of steps that compete, and what is printed of it."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One variant's figures.

    Attributes:
        variant: what was measured.
        median_ms: of one step, in milliseconds.
        ratio: to the variant that it is compared with, of the medians.
        against: the name of that variant; empty for a baseline.
    """

    variant: str
    median_ms: float
    ratio: float
    against: str


def interleaved_medians(steps: Sequence[Callable[[], None]], repeats: int) -> list[float]:
    """Median time (s) of each step, all of them run in turn, after some rounds to warm up."""
    seconds: list[list[float]] = [[] for _ in steps]
    for repeat in range(-max(3, repeats // 10), repeats):
        for step, found in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            if repeat >= 0:
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in seconds]


def report(title: str, rows: Sequence[Row], facts: dict[str, Any], output: Path | None) -> None:
    """Print the table, then the same as one line of JSON; write that to ``output`` if given."""
    table = Table(title=title)
    for heading in ("variant", "median (ms)", "ratio", "against"):
        table.add_column(
            heading, justify="right" if heading in ("median (ms)", "ratio") else "left"
        )
    for row in rows:
        table.add_row(row.variant, f"{row.median_ms:.3f}", f"{row.ratio:.3f}", row.against or "-")
    Console().print(table)
    write_figures({**facts, "rows": [dataclasses.asdict(row) for row in rows]}, output)


def write_figures(figures: dict[str, Any], output: Path | None) -> None:
    """Print them as one line of JSON; write that to ``output`` too if given."""
    text = json.dumps(figures)
    print(text)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
