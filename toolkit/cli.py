"""The ``gradient-bridge`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import toolkit
from toolkit.flag_types import DefaultsFormatter, positive_int


def build_parser() -> argparse.ArgumentParser:
    """The command's parser; every subcommand's function is its ``run`` default."""
    parser = argparse.ArgumentParser(
        prog="gradient-bridge",
        description="Train across jobs that share nothing but a directory.",
    )
    parser.add_argument("--version", action="version", version=toolkit.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a receiver alone, with a donor, and jointly, and compare",
        description=(
            "Launch four real jobs on bundled data: a donor and a receiver side by side, "
            "the receiver alone, and joint training in one job as the oracle. Ends with one table."
        ),
        formatter_class=DefaultsFormatter,
    )
    demo.add_argument("--task", choices=["digits", "overlap", "text"], default="digits")
    demo.add_argument("--num_seeds", type=positive_int, default=1, help="seeds 0, 1, ...")
    demo.add_argument("--max_train_steps", type=positive_int, help="optimizer steps")
    demo.add_argument(
        "--dtype",
        choices=["float32", "float64"],
        default="float64",
        help="of weights and images; in float32 rounding alone drives two runs apart",
    )
    demo.add_argument(
        "--num_processes", type=positive_int, default=1, help="ranks of donor and of receiver"
    )
    demo.add_argument("--runs_dir", type=Path, default=Path("runs"), help="where results go")
    demo.set_defaults(run=_demo)
    verify = commands.add_parser(
        "verify",
        help="replay a finished run without its donor, and compare the weights bit by bit",
        description=(
            "Check every payload that the receiver of a run applied against the run's ledger, then "
            "launch the receiver again, with the same arguments and ranks and these payloads in "
            "place of a donor, and compare its final weights with the run's. For runs of "
            "recipes/receiver.py with --keep_payloads, resumed ones too."
        ),
        epilog=(
            "Exit status: 0 if the weights are bitwise equal, 1 if not, 2 if the run cannot be "
            "replayed (not ended, no payloads kept, a payload missing or changed). Equal bits can "
            "be asked for on the CPU, with the versions of torch that the run had; on a GPU, look "
            "at the largest difference."
        ),
        formatter_class=DefaultsFormatter,
    )
    verify.add_argument("run_dir", metavar="RUN", help="a run: runs/0001, or 0001 in --runs_dir")
    verify.add_argument("--runs_dir", type=Path, default=Path("runs"), help="where runs are")
    verify.add_argument(
        "--output_dir", type=Path, help="of the receiver, if it was given one; else RUN/receiver"
    )
    verify.add_argument(
        "--key_file", type=Path, help="with the run's key, if GRADIENT_BRIDGE_KEY does not hold it"
    )
    verify.add_argument("--json", action="store_true", help="print one JSON object, no table")
    verify.set_defaults(run=_verify)
    return parser


def _demo(args: argparse.Namespace) -> int:
    from toolkit.demo import run_demo

    return run_demo(args)


def _verify(args: argparse.Namespace) -> int:
    from toolkit.verify import run_verify

    return run_verify(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command; the exit status."""
    args = build_parser().parse_args(argv)

    from toolkit.launching import terminable

    try:
        with terminable():
            return int(args.run(args))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
