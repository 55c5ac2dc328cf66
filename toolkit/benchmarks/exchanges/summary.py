"""Figures of many trials: mean and spread, and how much of joint training's gain a row recovers."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from toolkit.benchmarks.exchanges.rows import ALONE, JOINT, LOCKSTEP, ROWS
from toolkit.benchmarks.exchanges.trials import Outcome

HEADS = ("h1", "h2")
SMALLEST_GAIN = 1.0  # points; a share of less than that would be a share of noise


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One row over all seeds.

    Attributes:
        row: its name.
        title: for people.
        accuracies: by head, in percent, by seed.
        recovery: by head, in percent of joint training's gain; None where that cannot be said.
        payloads: that a donor published, mean.
        mib: of all records of both jobs, mean; None where that is not known.
        donor_mib: of them the donor's, likewise.
        mean_staleness: of payloads, in receiver steps; None where they have no age.
        seconds: of training, mean.
        time_ratio: to lockstep, median over seeds; None without lockstep.
    """

    row: str
    title: str
    accuracies: dict[str, list[float]]
    recovery: dict[str, float | None]
    payloads: float
    mib: float | None
    donor_mib: float | None
    mean_staleness: float | None
    seconds: float
    time_ratio: float | None


def summarize(outcomes: Sequence[Outcome]) -> list[Summary]:
    """A summary of every row that has outcomes, in the order of the table."""
    by_row = {name: [o for o in outcomes if o.row == name] for name in ROWS}
    means = {
        name: {head: statistics.mean(o.accuracies[head] for o in found) for head in HEADS}
        for name, found in by_row.items()
        if found
    }
    lockstep = {o.seed: o.training_seconds for o in by_row[LOCKSTEP] if o.training_seconds}
    summaries = []
    for name, mean in means.items():
        found = by_row[name]
        ratios = [o.training_seconds / lockstep[o.seed] for o in found if o.seed in lockstep]
        summaries.append(
            Summary(
                row=name,
                title=ROWS[name].title,
                accuracies={head: [o.accuracies[head] for o in found] for head in HEADS},
                recovery={head: recovery(means, mean, head) for head in HEADS},
                payloads=statistics.mean(o.payloads for o in found),
                mib=_mean([o.mib for o in found]),
                donor_mib=_mean([o.donor_mib for o in found]),
                mean_staleness=_mean([o.mean_staleness for o in found]),
                seconds=statistics.mean(o.training_seconds for o in found),
                time_ratio=statistics.median(ratios) if ratios else None,
            )
        )
    return summaries


def recovery(means: dict[str, dict[str, float]], mean: dict[str, float], head: str) -> float | None:
    """Percent of joint training's gain over the receiver alone; None where it gains too little."""
    if ALONE not in means or JOINT not in means:
        return None
    alone, joint = means[ALONE][head], means[JOINT][head]
    return 100 * (mean[head] - alone) / (joint - alone) if joint - alone >= SMALLEST_GAIN else None


def notes(summaries: Sequence[Summary]) -> list[str]:
    """Why a recovery cannot be said."""
    by_row = {summary.row: summary for summary in summaries}
    if ALONE not in by_row or JOINT not in by_row:
        return [f"recovery needs the rows {ALONE!r} and {JOINT!r}"]
    found = []
    for head in HEADS:
        joint, alone = (statistics.mean(by_row[row].accuracies[head]) for row in (JOINT, ALONE))
        if joint - alone < SMALLEST_GAIN:
            found.append(
                f"{head}: joint training changes it by {joint - alone:+.1f} points, so that there "
                "is no gain to recover"
            )
    return found


def table(summaries: Sequence[Summary], task: str, num_steps: int) -> Table:
    """For the terminal."""
    num_seeds = max(len(summary.accuracies[HEADS[0]]) for summary in summaries)
    seeds = "1 seed" if num_seeds == 1 else f"mean ± standard deviation of {num_seeds} seeds"
    result = Table(
        title=f"{task}: {num_steps} steps, {seeds}",
        caption="gain: part of what joint training gains over the receiver alone; MiB: in both "
        "directions; time: of training, over lockstep's",
        box=box.HORIZONTALS,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    result.add_column("row", no_wrap=True)
    headings = [*(f"{head}\n(%)" for head in HEADS), *(f"{head}\ngain\n(%)" for head in HEADS)]
    for heading in [*headings, "payloads", "MiB", "donor's\nMiB", "time"]:
        result.add_column(heading, justify="right", no_wrap=True)
    for summary in summaries:
        result.add_row(
            summary.row,
            *(spread(summary.accuracies[head]) for head in HEADS),
            *(_cell(summary.recovery[head], ".0f") for head in HEADS),
            f"{summary.payloads:.0f}",
            _cell(summary.mib, ".1f"),
            _cell(summary.donor_mib, ".2f"),
            _cell(summary.time_ratio, ".2f"),
        )
    return result


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation of more than one value."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f}±{statistics.stdev(values):.1f}"


def as_json(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """Fit for JSON."""
    return [dataclasses.asdict(summary) for summary in summaries]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
