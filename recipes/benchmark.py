"""Measure what the parts of this toolkit cost and save.

    python recipes/benchmark.py isolation
    python recipes/benchmark.py rotograd
    python recipes/benchmark.py exchanges --task overlap --plot exchanges.png
    python recipes/benchmark.py bridge --plot bridge.png
    python recipes/benchmark.py traffic --parameters 1e9

The variants of the first two run side by side in one process and on one thread, interleaved, so
that a busy machine slows them alike; what counts is the ratio of their medians. The next two launch
real donors and receivers; ``bridge`` compares, interleaved too, what the bridge adds to their steps
with moving the same bytes by hand. ``traffic`` only calculates.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from toolkit.benchmarks.bridge.measure import PARTS, measure_bridge
from toolkit.benchmarks.exchanges.measure import measure_exchanges
from toolkit.benchmarks.exchanges.rows import ROWS
from toolkit.benchmarks.isolation import measure_isolation
from toolkit.benchmarks.rotograd import NETWORKS, NUM_TASKS, SIZES, measure_rotograd
from toolkit.benchmarks.traffic import measure_traffic
from toolkit.bundled import TASKS
from toolkit.flag_types import DefaultsFormatter, positive_float, positive_int
from toolkit.training import clean_errors


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; ``measure`` is the subcommand's function."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", type=Path, help="write the figures here too, as JSON")
    parser = argparse.ArgumentParser(description="Measure what parts of this toolkit cost or save.")
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    isolation = commands.add_parser(
        "isolation",
        parents=[common],
        help="one forward for two losses, against two",
        description="A step of two models, one feeding the other, each with a loss of its own.",
        formatter_class=DefaultsFormatter,
    )
    add = isolation.add_argument
    add("--repeats", type=positive_int, default=200, help="steps of each variant")
    add("--batch_size", type=positive_int, default=256, help="samples")
    add("--hidden_size", type=positive_int, default=512, help="of both models")
    isolation.set_defaults(measure=measure_isolation)
    rotograd = commands.add_parser(
        "rotograd",
        parents=[common],
        help="RotoGrad, and the package of that name where it is installed, against a plain sum",
        description="A step of several tasks on one backbone: forward, backward and optimizer "
        "(Adam). Time and peak memory of RotoGrad over those of a plain sum of losses.",
        formatter_class=DefaultsFormatter,
    )
    add = rotograd.add_argument
    add("--repeats", type=positive_int, default=30, help="steps of each variant")
    add("--batch_size", type=positive_int, default=128, help="samples")
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="backbones")
    add("--num_tasks", nargs="+", type=positive_int, default=list(NUM_TASKS), help="K, of each")
    add("--sizes", nargs="+", type=positive_int, default=list(SIZES), help="d, of each")
    rotograd.set_defaults(measure=measure_rotograd)
    exchanges = commands.add_parser(
        "exchanges",
        parents=[common],
        help="every way to share, between the receiver alone and joint training",
        description="Launch real donors and receivers on bundled data, for every way to share and "
        "every seed, and compare accuracies, bytes and time. A row's gain is its part of what "
        "joint training gains over the receiver alone: 0 % as alone, 100 % as joint. Rows: "
        + "; ".join(f"{row.name}: {row.title}" for row in ROWS.values()),
        formatter_class=DefaultsFormatter,
    )
    add = exchanges.add_argument
    add("--task", choices=TASKS, default="digits", help="bundled data; text needs transformers")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="to launch")
    add("--num_seeds", type=positive_int, default=5, help="seeds 0, 1, ...")
    add("--max_train_steps", type=positive_int, default=1280, help="optimizer steps")
    add("--dtype", choices=("float32", "float64"), default="float32", help="of weights and images")
    add(
        "--jobs",
        type=positive_int,
        default=2,
        help="launched jobs at a time; times are worth something with as many free cores only",
    )
    add("--plot", type=Path, help="write a picture (PNG) here; needs matplotlib")
    add("--runs_dir", type=Path, default=Path("runs"), help="where results go")
    exchanges.set_defaults(measure=measure_exchanges)
    bridge = commands.add_parser(
        "bridge",
        parents=[common],
        help="what the bridge adds to a step, over the least that it could",
        description="Launch a receiver and a donor that train on noise, on one thread each, and "
        "compare the time that the bridge adds with a hand-over of as many raw bytes, as durable "
        "and as certain. What misses a goal is red. Parts: rounds (in lockstep, by size), steps "
        "(in lockstep, by length of a step), asynchronous (where no step waits), profile (of their "
        "calls), transport (bandwidth of records), peers (a round trip by what else could be used, "
        "up to 25 M parameters; of Flower where it is installed), "
        "donors, files and ranks (how cost grows with their number; ranks with the first two "
        "sizes), starts (import and --help, 9 times at most).",
        formatter_class=DefaultsFormatter,
    )
    add = bridge.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="to measure")
    add(
        "--sizes",
        nargs="+",
        type=positive_float,
        default=[0.1, 5.0, 25.0, 100.0],
        help="millions of shared parameters",
    )
    add("--batch_sizes", nargs="+", type=positive_int, default=[4, 32, 256], help="of steps")
    add("--repeats", type=positive_int, default=30, help="rounds of each kind")
    add("--plot", type=Path, help="write a picture (PNG) here; needs matplotlib")
    add("--runs_dir", type=Path, default=Path("runs"), help="on the disk that is measured")
    bridge.set_defaults(measure=measure_bridge)
    traffic = commands.add_parser(
        "traffic",
        parents=[common],
        help="bytes and round trips per step of every exchange, by arithmetic",
        description="Nothing is measured: what crosses the disk in each step, for a model's size.",
        formatter_class=DefaultsFormatter,
    )
    add = traffic.add_argument
    add("--parameters", type=positive_float, default=1e9, help="of the backbone")
    add("--head_parameters", type=positive_float, default=1e6, help="of the donor's head")
    traffic.set_defaults(measure=measure_traffic)
    args = parser.parse_args()
    for name in ("output", "plot"):
        path = getattr(args, name, None)
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"--{name}: there is no directory {path.absolute().parent}")
    return args


def main() -> None:
    """Measure what the subcommand says."""
    args = parse_arguments()
    args.measure(args)


if __name__ == "__main__":
    with clean_errors():
        main()
