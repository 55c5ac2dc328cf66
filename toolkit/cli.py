"""The ``gradient-bridge`` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import toolkit
from toolkit.flag_types import DefaultsFormatter, positive_float, positive_int

Subcommands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def build_parser() -> argparse.ArgumentParser:
    """The command's parser; every subcommand's function is its ``run`` default."""
    parser = argparse.ArgumentParser(
        prog="gradient-bridge",
        description="Train across jobs that share nothing but a directory.",
    )
    parser.add_argument("--version", action="version", version=toolkit.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_verify(commands)
    _add_inspect(commands)
    _add_doctor(commands)
    _add_reasons(commands)
    return parser


def _add_demo(commands: Subcommands) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a receiver alone, with a donor, and jointly, and compare",
        description=(
            "Launch four real jobs on bundled data: a donor and a receiver side by side, "
            "the receiver alone, and joint training in one job as the oracle. Ends with one table."
        ),
        epilog=(
            "Exit status: 0 if all jobs ended well, 1 if one failed, 2 if --runs_dir cannot be "
            "used. The fields of --json: toolkit/demo.py."
        ),
        formatter_class=DefaultsFormatter,
    )
    demo.add_argument(
        "--task",
        choices=["digits", "overlap", "text"],
        default="digits",
        help="bundled data; text needs transformers",
    )
    demo.add_argument("--num_seeds", type=positive_int, default=1, help="seeds 0, 1, ...")
    demo.add_argument(
        "--max_train_steps", type=positive_int, help="optimizer steps; 400 if left out"
    )
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
    _add_json(demo)
    demo.set_defaults(run=_demo)


def _add_verify(commands: Subcommands) -> None:
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
            "at the largest difference. The fields of --json: toolkit/verify.py."
        ),
        formatter_class=DefaultsFormatter,
    )
    verify.add_argument("run_dir", metavar="RUN", help="a run: runs/0001, or 0001 in --runs_dir")
    verify.add_argument(
        "--output_dir", type=Path, help="of the receiver, if it was given one; else RUN/receiver"
    )
    _add_of_runs(verify)
    verify.set_defaults(run=_verify)


def _add_inspect(commands: Subcommands) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show a run's jobs, who lives, and what became of every payload",
        description=(
            "Show the jobs of a run and whether they live, what lies on the disk, and the fate of "
            "every payload. Given several runs, one line for each. Only reads, and may be used "
            "while the jobs run. A job lives if its heartbeat counter moves while it is watched; "
            "no clocks are compared."
        ),
        epilog=(
            "Exit status: 0 if nothing is wrong, 1 if something is (files that cannot be read, "
            "payloads without a fate, with --verify bad records), 2 if there is no run. A silent "
            "job is not wrong. gradient-bridge reasons says what the words mean. The fields of "
            "--json: toolkit/inspection/report.py."
        ),
        formatter_class=DefaultsFormatter,
    )
    inspect.add_argument(
        "directory", metavar="DIR", nargs="?",
        help="a runs directory, or one run: runs/0001, or 0001 in --runs_dir; all of --runs_dir "
        "if left out",
    )  # fmt: skip
    inspect.add_argument(
        "--verify", action="store_true", help="read every record in full and check its digests"
    )
    inspect.add_argument(
        "--seconds", type=positive_float,
        help="watch silent jobs for so long; as long as the jobs do themselves (5) if left out",
    )  # fmt: skip
    _add_of_runs(inspect)
    inspect.set_defaults(run=_inspect)


def _add_doctor(commands: Subcommands) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="measure a file system, and say which settings fit it",
        description=(
            "Measure what the file system at DIR gives to two jobs that share it: whether names "
            "are made exclusively and files replaced whole, what syncing costs, how fast large "
            "files are written and read, and how soon another process sees a new file. Then say "
            "which exchange fits. Everything is measured in a new directory below DIR, which is "
            "deleted at the end."
        ),
        epilog=(
            "Exit status: 0 if the bridge can be used there, 1 if not. Both processes run on this "
            "host; a network file system may show a new file to another host later than to this "
            "one. The fields of --json: toolkit/doctor/report.py."
        ),
        formatter_class=DefaultsFormatter,
    )
    doctor.add_argument(
        "directory", metavar="DIR", help="the --runs_dir that both jobs are to share"
    )
    doctor.add_argument(
        "--seconds", type=positive_float, default=5.0, help="measure for so long, about"
    )
    doctor.add_argument(
        "--payload_mib", type=positive_float, default=64.0,
        help="size of backbone and one head in float32, MiB",
    )  # fmt: skip
    doctor.add_argument(
        "--step_seconds", type=positive_float, default=1.0, help="how long a training step takes"
    )
    _add_json(doctor)
    doctor.set_defaults(run=_doctor)


def _add_reasons(commands: Subcommands) -> None:
    reasons = commands.add_parser(
        "reasons",
        help="say what the words mean by which jobs and commands say what happened",
        description=(
            "Print one table of all fates, reasons, alarms, states and exit statuses: what each "
            "means, and what to do about it."
        ),
        epilog="The fields of --json: kind, code, meaning, remedy.",
    )
    _add_json(reasons)
    reasons.set_defaults(run=_reasons)


def _add_of_runs(command: argparse.ArgumentParser) -> None:
    """Flags of the commands that look at runs."""
    command.add_argument("--runs_dir", type=Path, default=Path("runs"), help="where runs are")
    command.add_argument(
        "--key_file", type=Path, help="with the run's key, if GRADIENT_BRIDGE_KEY does not hold it"
    )
    _add_json(command)


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object, no table")


def _demo(args: argparse.Namespace) -> int:
    from toolkit.demo import run_demo

    return run_demo(args)


def _verify(args: argparse.Namespace) -> int:
    from toolkit.verify import run_verify

    return run_verify(args)


def _inspect(args: argparse.Namespace) -> int:
    from toolkit.inspection.command import run_inspect

    return run_inspect(args)


def _doctor(args: argparse.Namespace) -> int:
    from toolkit.doctor.command import run_doctor

    return run_doctor(args)


def _reasons(args: argparse.Namespace) -> int:
    from toolkit.reasons import run_reasons

    return run_reasons(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command; the exit status."""
    args = build_parser().parse_args(argv)

    from toolkit.launching import terminable

    try:
        with terminable():
            status = int(args.run(args))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # as after `| head`
        # What is still to be written must not fail once more at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
