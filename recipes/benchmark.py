"""Measure what the parts of this toolkit cost and save.

    python recipes/benchmark.py isolation
    python recipes/benchmark.py rotograd

All variants run side by side in one process and on one thread, interleaved, so that a busy machine
slows them alike; what counts is the ratio of their medians.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from toolkit.benchmarks.isolation import measure_isolation
from toolkit.benchmarks.rotograd import NETWORKS, NUM_TASKS, SIZES, measure_rotograd
from toolkit.flag_types import DefaultsFormatter, positive_int


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
    args = parser.parse_args()
    if args.output is not None and not args.output.absolute().parent.is_dir():
        parser.error(f"--output: there is no directory {args.output.absolute().parent}")
    return args


def main() -> None:
    """Measure what the subcommand says."""
    args = parse_arguments()
    args.measure(args)


if __name__ == "__main__":
    main()
