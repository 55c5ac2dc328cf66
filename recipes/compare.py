"""Compare ways to train several tasks whose gradients conflict.

    python recipes/compare.py pair
    python recipes/compare.py toy

``pair`` launches ``recipes/joint.py --task pair`` with each method and each of several seeds, and
prints one table of the metrics on images that none has seen. ``toy`` trains the paper's two-task
problem, where one can see the features move. Neither picks seeds or stops early.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    track,
)
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from toolkit.flag_types import DefaultsFormatter, positive_float, positive_int
from toolkit.launching import JobFailedError, LaunchedJob, follow, launch
from toolkit.methods import find_method
from toolkit.multitask import PAIR_TASKS
from toolkit.toy import AUTHORS_SEED, LEAST_LOSS, NUM_STEPS, ToyRun, draw_trajectories, train_toy
from toolkit.training import clean_errors, new_output_dir

PAIR_METHODS = ("sum", "rotate", "rotograd", "rotogradnorm", "pcgrad", "upgrad", "mgda")
TOY_METHODS = (
    ("vanilla", "vanilla", "identity"),
    ("rotate", "rotate", "identity"),
    ("rotograd", "rotograd", "identity"),
    ("rotate, random start", "rotate", "random"),
    ("rotograd, random start", "rotograd", "random"),
)
SOLVED = 0.1  # how far above its least value a task's loss may be to count as solved


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; ``compare`` is the subcommand's function."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--output_dir", type=Path, help="for figures and runs; by default the next runs/compare-N"
    )
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    pair = commands.add_parser(
        "pair",
        parents=[common],
        help="five tasks on two digits side by side",
        description="Launch joint training with each method and seed. Adam, as in the paper.",
        formatter_class=DefaultsFormatter,
    )
    add = pair.add_argument
    add("--methods", nargs="+", metavar="METHOD", default=PAIR_METHODS, help="of recipes/joint.py")
    add("--num_seeds", type=positive_int, default=5, help="seeds 0, 1, ...")
    add("--max_train_steps", type=positive_int, default=2000, help="optimizer steps")
    add("--batch_size", type=positive_int, default=64, help="samples per step")
    add("--learning_rate", type=positive_float, default=1e-3, help="of the network")
    add("--learning_rate_rotation", type=positive_float, default=5e-4, help="of rotations")
    add("--num_parallel", type=positive_int, default=1, help="jobs at a time, one core each")
    pair.set_defaults(compare=compare_pair)
    toy = commands.add_parser(
        "toy",
        parents=[common],
        help="the paper's two-task problem in the plane",
        description="Train the paper's toy problem over many seeds; in this process.",
        formatter_class=DefaultsFormatter,
    )
    toy.add_argument("--num_seeds", type=positive_int, default=20, help="seeds 0, 1, ...")
    toy.add_argument("--max_train_steps", type=positive_int, default=NUM_STEPS, help="steps")
    toy.set_defaults(compare=compare_toy)
    args = parser.parse_args()
    for method in getattr(args, "methods", ()):
        try:
            find_method(method, len(PAIR_TASKS))
        except ValueError as error:
            pair.error(f"--methods: {error}")
        if args.methods.count(method) > 1:
            pair.error(f"--methods: {method!r} is there more than once")
    return args


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, with digits that suit the size."""
    mean = statistics.mean(values)
    digits = 1 if abs(mean) >= 10 else 2 if abs(mean) >= 0.1 else 4
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column is the rows' names."""
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading.replace("/", "\n"), justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def write_figures(output_dir: Path, figures: dict[str, Any]) -> None:
    """As ``results.json``."""
    text = json.dumps(figures, indent=2) + "\n"
    (output_dir / "results.json").write_text(text, encoding="utf-8")
    print(f"results: {output_dir}; curves: tensorboard --logdir {output_dir}")


def train_pairs(args: argparse.Namespace) -> dict[str, list[LaunchedJob]]:
    """One finished job for each method and seed."""
    jobs: dict[str, list[LaunchedJob]] = {method: [] for method in args.methods}
    flags = ["--task=pair", "--weight_decay=0", f"--eval_steps={args.max_train_steps}"]
    flags += [f"--per_device_train_batch_size={args.batch_size}"]
    flags += [f"--max_train_steps={args.max_train_steps}", f"--learning_rate={args.learning_rate}"]
    rotation = f"--learning_rate_rotation={args.learning_rate_rotation}"
    waiting = [(method, seed) for seed in range(args.num_seeds) for method in args.methods]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as progress:
        overall = progress.add_task("jobs", total=len(waiting))
        for start in range(0, len(waiting), args.num_parallel):
            running = []
            for method, seed in waiting[start : start + args.num_parallel]:
                name = f"{method}-{seed}".replace(":", "-")
                own = [f"--method={method}", f"--seed={seed}"]
                own += [f"--output_dir={args.output_dir / name}"]
                own += [rotation] if method.startswith("rot") else []
                running.append(launch("joint", name, args.output_dir / name, [*flags, *own]))
                jobs[method].append(running[-1])
            follow(running, progress)
            progress.advance(overall, len(running))
    return jobs


def compare_pair(args: argparse.Namespace) -> None:
    """Launch all jobs, then print the table."""
    start_time = time.monotonic()
    jobs = train_pairs(args)
    metrics: dict[str, list[dict[str, float]]] = {
        method: [job.results()["metrics"] for job in found]  # type: ignore[misc]
        for method, found in jobs.items()
    }
    tags = list(next(iter(metrics.values()))[0])
    rows = [
        [method, *(spread([one[tag] for one in found]) for tag in tags)]
        for method, found in metrics.items()
    ]
    title = f"Five tasks on pairs of digits, mean ± standard deviation of {args.num_seeds} seeds"
    print_table(title, ["method", *tags], rows)
    settings = {key: value for key, value in vars(args).items() if isinstance(value, int | float)}
    seconds = time.monotonic() - start_time
    write_figures(args.output_dir, {**settings, "seconds": seconds, "metrics": metrics})


def compare_toy(args: argparse.Namespace) -> None:
    """Train every method with every seed; print the table and draw where the features went."""
    runs: dict[str, list[ToyRun]] = {
        name: [
            train_toy(method, seed, init=init, num_steps=args.max_train_steps)  # type: ignore[arg-type]
            for seed in track(range(args.num_seeds), description=name)
        ]
        for name, method, init in TOY_METHODS
    }
    rows, figures = [], {}
    for name, found in runs.items():
        pairs = list(zip(found, runs["vanilla"], strict=True))
        figures[name] = {
            "losses": [run.losses for run in found],
            "mean loss": statistics.mean(run.mean_loss for run in found),
            "better than vanilla": sum(a.mean_loss < b.mean_loss - 1e-3 for a, b in pairs),
            "worse than vanilla": sum(a.mean_loss > b.mean_loss + 1e-3 for a, b in pairs),
            "both solved": sum(max(run.losses) < LEAST_LOSS + SOLVED for run in found),
        }
        row = [name, spread([run.mean_loss for run in found])]
        row += [str(figures[name][key]) for key in ("better than vanilla", "worse than vanilla")]
        row += [str(figures[name]["both solved"])]
        shown = found[AUTHORS_SEED : AUTHORS_SEED + 1]
        rows.append([*row, *(f"{a:.2f}, {b:.2f}" for a, b in (run.losses for run in shown))])
    headings = ["method", "mean loss of both tasks", "seeds better than vanilla", "worse"]
    headings += ["both tasks solved"]
    if args.num_seeds > AUTHORS_SEED:
        headings += [f"seed {AUTHORS_SEED}, which the authors show: losses"]
    print_table(
        f"The paper's toy problem, {args.num_seeds} seeds; least {LEAST_LOSS}", headings, rows
    )
    seeds = [seed for seed in (AUTHORS_SEED, 0, 1) if seed < args.num_seeds]
    titles = {AUTHORS_SEED: f"seed {AUTHORS_SEED}, the one that the authors show"}
    image = draw_trajectories(
        [
            (titles.get(seed, f"seed {seed}"), [(name, runs[name][seed]) for name in runs])
            for seed in seeds
        ]
    )
    image.save(args.output_dir / "trajectories.png")
    with SummaryWriter(str(args.output_dir)) as writer:
        writer.add_image("toy/trajectories", np.asarray(image), dataformats="HWC")
        for name, found in runs.items():
            for seed, run in enumerate(found):
                writer.add_scalar(f"toy mean loss by seed/{name}", run.mean_loss, seed)
    write_figures(args.output_dir, {"num_seeds": args.num_seeds, "methods": figures})


def main() -> None:
    """Compare what the subcommand says."""
    args = parse_arguments()
    PartialState(cpu=True)
    if args.output_dir is None:
        args.output_dir = new_output_dir(Path("runs"), "compare")
    args.output_dir = args.output_dir.absolute()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    args.compare(args)


if __name__ == "__main__":
    with clean_errors(JobFailedError):
        main()
