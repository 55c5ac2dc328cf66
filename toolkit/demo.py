"""``gradient-bridge demo``: real jobs side by side, and one table that compares them.

Per seed: a donor and a receiver at the same time; then the receiver alone and joint training at
the same time. Every job is started with ``accelerate launch``, on the CPU, as a user would.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from toolkit.launching import JobFailedError, LaunchedJob, follow, launch, new_directory

ALONE_PEER_WAIT_SECONDS = 1


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


def largest_weight_difference(a: Path, b: Path) -> float:
    """max |a - b| over all tensors of two ``model.safetensors`` files."""
    import torch
    from safetensors.torch import load_file

    first, second = load_file(a), load_file(b)
    if set(first) != set(second):
        raise ValueError(f"{a} and {b} hold different tensors: {set(first) ^ set(second)}")
    differences = torch.stack([(first[name] - second[name]).abs().max() for name in first])
    return float(differences.max())  # NaN if one of them is


def _cell(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def _table(rows: dict[str, list[dict[str, object]]], num_seeds: int) -> Table:
    seeds = "1 seed" if num_seeds == 1 else f"mean ± standard deviation of {num_seeds} seeds"
    table = Table(title=f"Accuracy (%), {seeds}")
    for column in ("", "h1", "h2"):
        table.add_column(column, justify="left" if not column else "right")
    for row, results in rows.items():
        accuracies = [result["accuracies (%)"] for result in results]
        cells = [_cell([a[head] for a in accuracies]) for head in ("h1", "h2")]  # type: ignore[index]
        table.add_row(row, *cells)
    return table


def run_demo(args: argparse.Namespace) -> int:
    """Run the demo and print its table; the exit status."""
    console = Console()
    root = new_directory(args.runs_dir, "demo")
    rows: dict[str, list[dict[str, object]]] = {}
    differences = []
    start = time.monotonic()
    console.print(f"Four jobs per seed, launched with accelerate; logs and results in {root}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        try:
            for seed in range(args.num_seeds):
                jobs = train_one_seed(args, root, seed, progress)
                for row, job in jobs.items():
                    rows.setdefault(row, []).append(job.results())
                files = [jobs[row].output_dir / "model.safetensors" for row in ("bridge", "joint")]
                differences.append(largest_weight_difference(files[0], files[1]))
        except JobFailedError as error:
            progress.stop()
            console.print(f"[bold red]failed:[/] {error}", highlight=False)
            return 1
    console.print(_table(rows, args.num_seeds))
    console.print(
        f"largest difference of final weights, bridge to joint: {max(differences):.2e} "
        f"({args.dtype})", highlight=False,
    )  # fmt: skip
    console.print(f"took {time.monotonic() - start:.0f} s; results: {root}", highlight=False)
    console.print(f"look at the curves: tensorboard --logdir {root}", highlight=False)
    return 0
