"""``recipes/benchmark.py exchanges``: launch every row with every seed, and report."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from toolkit.benchmarks.exchanges.plot import NEEDED, can_plot, plot
from toolkit.benchmarks.exchanges.rows import ROWS
from toolkit.benchmarks.exchanges.summary import as_json, notes, summarize, table
from toolkit.benchmarks.exchanges.trials import Outcome, Trial
from toolkit.benchmarks.timing import write_figures
from toolkit.launching import JobFailedError, new_directory, terminable

_POLL_SECONDS = 0.1


def run_trials(
    trials: Sequence[Trial],
    num_jobs: int,
    num_steps: int,
    progress: Progress,
    outcomes: list[Outcome],
) -> None:
    """Run all trials in order, as many side by side as ``num_jobs`` jobs allow.

    Args:
        trials: to run; one that has more jobs than that runs by itself.
        num_jobs: at a time.
        num_steps: of each trial, for its bar.
        progress: shows one bar for all trials and one for each that runs.
        outcomes: gets those of all trials that end well.

    Raises:
        JobFailedError: if a job ended with an error; ``terminable()`` then stops all others.
    """
    waiting, running = list(trials), dict[Trial, TaskID]()
    overall = progress.add_task("all", total=len(trials))
    while waiting or running:
        busy = sum(trial.row.num_jobs for trial in running)
        if waiting and (not running or busy + waiting[0].row.num_jobs <= num_jobs):
            trial = waiting.pop(0)
            running[trial] = progress.add_task(trial.name, total=num_steps)
        for trial, bar in list(running.items()):
            if trial.advance():
                outcomes.append(trial.outcome())
                del running[trial]
                progress.remove_task(bar)
                progress.advance(overall)
            else:
                progress.update(bar, completed=trial.completed_steps)
        time.sleep(_POLL_SECONDS)


def measure_exchanges(args: argparse.Namespace) -> None:
    """Launch what ``args`` asks for; print a table, write JSON and a picture."""
    if args.plot is not None and not can_plot():
        sys.exit(f"error: {NEEDED}")
    console = Console()
    rows = [row for name, row in ROWS.items() if name in args.rows]
    root = new_directory(args.runs_dir, "exchanges")
    # Seed by seed, so that rows to compare run under the same conditions of the machine.
    trials = [Trial(row, seed, root, args) for seed in range(args.num_seeds) for row in rows]
    console.print(f"{len(trials)} trials, at most {args.jobs} jobs at a time; logs in {root}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    outcomes: list[Outcome] = []
    failure = ""
    try:
        bars = Progress(*columns, TimeElapsedColumn(), console=console)
        with terminable(), bars as progress:
            run_trials(trials, args.jobs, args.max_train_steps, progress, outcomes)
    except JobFailedError as error:
        failure = str(error)
    summaries = summarize(outcomes)
    if summaries:
        console.print(table(summaries, args.task, args.max_train_steps))
    if failure:
        console.print(f"[bold red]failed:[/] {escape(failure)}", highlight=False)
        sys.exit(1)
    for note in notes(summaries):
        console.print(note, highlight=False)
    facts = {
        "benchmark": "exchanges",
        "task": args.task,
        "num_seeds": args.num_seeds,
        "max_train_steps": args.max_train_steps,
        "dtype": args.dtype,
        "jobs": args.jobs,
        "num_cpus": os.cpu_count(),
        "torch": torch.__version__,
    }
    if args.plot is not None:
        seeds = "1 seed" if args.num_seeds == 1 else f"{args.num_seeds} seeds and their mean"
        title = f"{args.task}: {args.max_train_steps} steps, {seeds}; dashed: alone, joint"
        plot(summaries, title, args.plot)
    write_figures({**facts, "rows": as_json(summaries)}, args.output)
