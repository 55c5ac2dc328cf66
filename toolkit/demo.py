"""``gradient-bridge demo``: real jobs side by side, and one table that compares them.

Per seed: a donor and a receiver at the same time; then the receiver alone and joint training at
the same time. Every job is started with ``accelerate launch``, on the CPU, as a user would.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from toolkit.launching import JobFailedError, LaunchedJob, follow, launch, new_directory
from toolkit.terminal import Output, report_error

FORMAT = 1  # of the JSON; while it is the same, fields may be added, but none goes away
DONE, FAILED, UNUSABLE = 0, 1, 2  # exit statuses
ALONE_PEER_WAIT_SECONDS = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What the demo came to, and what ``--json`` prints.

    Attributes:
        format: of this object.
        directory: with all logs and results.
        task: that was trained.
        dtype: of the weights.
        accuracies: in %, of each seed; by row of the table and by head.
        largest_differences: of a final weight, bridge to joint, for each seed; None where it is no
            finite number.
        seconds: that all jobs took.
    """

    format: int
    directory: str
    task: str
    dtype: str
    accuracies: dict[str, dict[str, list[float]]]
    largest_differences: list[float | None]
    seconds: float


def train_one_seed(
    args: argparse.Namespace, root: Path, seed: int, progress: Progress
) -> dict[str, LaunchedJob]:
    """The four jobs of one seed, by row of the table."""
    data: list[object] = ["--task", args.task, "--seed", seed, "--dtype", args.dtype]
    steps: list[object] = []
    if args.max_train_steps is not None:
        steps = ["--max_train_steps", args.max_train_steps]
    run_dir, alone_dir, ranks = (
        root / f"seed-{seed}",
        root / f"seed-{seed}-alone",
        args.num_processes,
    )
    bridge: list[object] = ["--runs_dir", root, "--run"]
    together = [*bridge, run_dir.name, "--require_peer"]
    alone = [*bridge, alone_dir.name, "--peer_wait", ALONE_PEER_WAIT_SECONDS]
    joint: list[object] = ["--receiver_processes", ranks, "--donor_processes", ranks]

    def start(row: str, recipe: str, output_dir: Path, flags: list[object]) -> LaunchedJob:
        num_processes = 1 if recipe == "joint" else ranks
        return launch(recipe, f"{row} (seed {seed})", output_dir, [*data, *flags], num_processes)

    donor = start("donor", "donor", run_dir / "donor", together)
    receiver = start("receiver", "receiver", run_dir / "receiver", [*steps, *together])
    follow([donor, receiver], progress)
    others = [
        start("alone", "receiver", alone_dir / "receiver", [*steps, *alone]),
        start(
            "joint", "joint", run_dir / "joint", [*steps, *joint, "--output_dir", run_dir / "joint"]
        ),
    ]
    follow(others, progress)
    return {"receiver alone": others[0], "bridge": receiver, "joint": others[1]}


def largest_weight_difference(a: Path, b: Path) -> float | None:
    """max |a - b| over all tensors of two ``model.safetensors`` files; None if it is no number."""
    import torch
    from safetensors.torch import load_file

    first, second = load_file(a), load_file(b)
    if set(first) != set(second):
        raise ValueError(f"{a} and {b} hold different tensors: {set(first) ^ set(second)}")
    differences = torch.stack([(first[name] - second[name]).abs().max() for name in first])
    largest = float(differences.max())
    return largest if math.isfinite(largest) else None


def run_all(args: argparse.Namespace, root: Path, progress: Progress) -> Comparison:
    """Train with every seed.

    Raises:
        JobFailedError: if a job fails.
    """
    start = time.monotonic()
    accuracies: dict[str, dict[str, list[float]]] = {}
    differences = []
    for seed in range(args.num_seeds):
        jobs = train_one_seed(args, root, seed, progress)
        for row, job in jobs.items():
            results: dict[str, Any] = job.results()
            for head, accuracy in results["accuracies (%)"].items():
                accuracies.setdefault(row, {}).setdefault(head, []).append(accuracy)
        files = [jobs[row].output_dir / "model.safetensors" for row in ("bridge", "joint")]
        differences.append(largest_weight_difference(files[0], files[1]))
    return Comparison(
        format=FORMAT,
        directory=str(root),
        task=args.task,
        dtype=args.dtype,
        accuracies=accuracies,
        largest_differences=differences,
        seconds=time.monotonic() - start,
    )


def _cell(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def _table(comparison: Comparison) -> Table:
    num_seeds = len(comparison.largest_differences)
    seeds = "1 seed" if num_seeds == 1 else f"mean ± standard deviation of {num_seeds} seeds"
    table = Table(title=f"Accuracy (%), {seeds}")
    for column in ("", "h1", "h2"):
        table.add_column(column, justify="left" if not column else "right")
    for row, accuracies in comparison.accuracies.items():
        table.add_row(row, *(_cell(accuracies[head]) for head in ("h1", "h2")))
    return table


def run_demo(args: argparse.Namespace) -> int:
    """Run the demo and print its table; the exit status."""
    console, errors = Output(), Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    report = functools.partial(report_error, as_json=args.json, runs_dir=str(args.runs_dir))
    try:
        root = new_directory(args.runs_dir, "demo")
    except OSError as error:
        report(OSError(f"cannot write in --runs_dir {args.runs_dir}: {error}; give another one"))
        return UNUSABLE
    errors.print(f"Four jobs per seed, launched with accelerate; logs and results in {root}")
    try:
        with Progress(*columns, TimeElapsedColumn(), console=errors) as progress:
            comparison = run_all(args, root, progress)
    except JobFailedError as error:
        report(error)
        return FAILED
    if args.json:
        print(json.dumps(dataclasses.asdict(comparison), indent=2))
        return DONE
    console.print(_table(comparison))
    known = [difference for difference in comparison.largest_differences if difference is not None]
    largest = f"{max(known):.2e}" if len(known) == args.num_seeds else "not a number"
    for line in (
        f"largest difference of final weights, bridge to joint: {largest} ({args.dtype})",
        f"took {comparison.seconds:.0f} s; results: {root}",
        f"look at the curves: tensorboard --logdir {root}",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return DONE
