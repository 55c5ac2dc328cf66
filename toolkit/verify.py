"""``gradient-bridge verify``: replay a finished run without its donor, and compare the weights.

The receiver's recipe is launched again with the arguments and the ranks that ``results.json``
holds. In every step it takes the kept payload that the ledger says the run took. On the CPU, with
the same versions, it must end in the same bits.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from toolkit.bridge.authentication import Signer, load_key
from toolkit.bridge.digests import digest_tensors
from toolkit.bridge.errors import BridgeError
from toolkit.finished_run import FinishedRun, find_run, open_run
from toolkit.launching import JobFailedError, follow, launch
from toolkit.parameters import same_bits
from toolkit.provenance import flags_of
from toolkit.terminal import Output, report_error

FORMAT = 1  # of the JSON; while it is the same, fields may be added, but none goes away
EQUAL, DIFFERENT, UNUSABLE = 0, 1, 2  # exit statuses
NAMED_TENSORS = 5  # of those that differ, so many are named
# Where the run wrote and whom it waited for; what the weights do not depend on.
NOT_REPEATED = (
    "runs_dir", "run", "peer_wait", "require_peer", "keep_payloads", "replay", "output_dir",
    "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "with_tracking",
    "report_to", "mixed_precision", "key_file",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What the replay of a run came to.

    Attributes:
        run: the run's directory.
        steps: of the receiver.
        payloads_applied: in these steps, each checked against the ledger.
        steps_alone: steps without one.
        differences: by name of each tensor that is not bitwise the same, the largest absolute
            difference of a value; None where there is no such number.
        departed_at: receiver steps after which the weights were first seen to be others.
        device: the replay's.
        seconds: that all of it took.
        warnings: what a difference may come from.
    """

    run: str
    steps: int
    payloads_applied: int
    steps_alone: int
    differences: dict[str, float | None]
    departed_at: int | None
    device: str
    seconds: float
    warnings: list[str]

    @property
    def bitwise_equal(self) -> bool:
        """Whether every tensor has the same bits."""
        return not self.differences

    @property
    def largest_difference(self) -> float | None:
        """Of a value, over all tensors; None if one of them has no such number."""
        values = list(self.differences.values())
        return None if None in values else max((v for v in values if v is not None), default=0.0)


def compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, float | None]:
    """By name of each tensor whose bits differ, the largest absolute difference of a value.

    None where a tensor is absent or has another shape, or the difference is no finite number.
    """
    differences: dict[str, float | None] = {}
    for name in sorted({*expected, *found}):
        pair = expected.get(name), found.get(name)
        if same_bits(*pair):
            continue
        first, second = pair
        differences[name] = None
        if first is not None and second is not None and first.shape == second.shape:
            largest = float((first.double() - second.double()).abs().max())
            differences[name] = largest if math.isfinite(largest) else None
    return differences


def environment_warnings(run: Mapping[str, Any], replay: Mapping[str, Any]) -> list[str]:
    """One line per thing that decides about bits and is not the same in both environments."""
    return [
        f"{name}: the run had {run[name]}, the replay has {replay.get(name)}; bits may differ"
        for name in run
        if name != "working_directory" and run[name] != replay.get(name)
    ]


def verify_run(
    run: FinishedRun, directory: Path, progress: Progress, key_file: Path | None
) -> Verification:
    """Check every payload, replay the run in ``directory``, and compare.

    Args:
        run: what to replay.
        directory: where the replay writes.
        progress: to show it.
        key_file: with the run's key; None where it has none or the environment has it.

    Raises:
        BridgeError: for a payload that is not what the ledger says.
        JobFailedError: if the replay fails.
    """
    start = time.monotonic()
    applied = run.payloads.applied
    for entry in progress.track(applied, description="checking payloads"):
        run.payloads.read(entry.donor, entry.sequence)
    arguments, environment = run.provenance["arguments"], run.provenance["environment"]
    flags = [
        *flags_of(arguments, leave_out=NOT_REPEATED),
        f"--runs_dir={directory / 'runs'}",
        f"--replay={run.directory.absolute()}",
        f"--mixed_precision={environment['mixed_precision']}",
        "--no-with_tracking",
    ]
    if key_file is not None:
        flags.append(f"--key_file={key_file.absolute()}")
    output_dir = directory / "replay"
    was_there = Path(environment["working_directory"])
    job = launch(
        "receiver",
        "replaying",
        output_dir,
        [*flags, f"--output_dir={output_dir}"],
        run.results["num_processes"],
        on_gpu=environment["device"].startswith("cuda"),
        num_threads=environment["num_threads"],
        cwd=was_there if was_there.is_dir() else None,  # for data given by a relative path
    )
    follow([job], progress)
    replayed: dict[str, Any] = job.results()
    warnings = environment_warnings(environment, replayed["provenance"]["environment"])
    together = len({entry.receiver_step for entry in applied})
    if run.results["steps_alone"] + together != run.results["completed_steps"]:
        warnings.append(
            f"the ledger has {together} steps in which payloads were applied, but results.json has "
            f"{run.results['completed_steps']} steps, {run.results['steps_alone']} of them alone"
        )
    if replayed["completed_steps"] != run.results["completed_steps"]:
        warnings.append(
            f"the replay took {replayed['completed_steps']} steps, and the run "
            f"{run.results['completed_steps']}"
        )
    if run.provenance["final_weights_digest"] != digest_tensors(run.weights):
        warnings.append("the weights on the disk are not those that the run wrote at its end")
    return Verification(
        run=str(run.directory),
        steps=replayed["completed_steps"],
        payloads_applied=len(applied),
        steps_alone=replayed["steps_alone"],
        differences=compare(run.weights, load_file(output_dir / "model.safetensors")),
        departed_at=replayed["provenance"]["departed_at"],
        device=replayed["provenance"]["environment"]["device"],
        seconds=time.monotonic() - start,
        warnings=warnings,
    )


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.3g}"


def _table(verification: Verification) -> Table:
    table = Table(title=f"Replay of {verification.run}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in (
        ("steps", str(verification.steps)),
        ("payloads applied", str(verification.payloads_applied)),
        ("steps alone", str(verification.steps_alone)),
        ("largest difference", _number(verification.largest_difference)),
        ("bitwise equal", "yes" if verification.bitwise_equal else "NO"),
        ("device", verification.device),
        ("seconds", f"{verification.seconds:.1f}"),
    ):
        table.add_row(name, value)
    return table


def _remarks(verification: Verification, num_starts: int) -> list[str]:
    """What the table does not say: warnings, and where the weights differ."""
    remarks = [f"warning: {warning}" for warning in verification.warnings]
    if verification.bitwise_equal:
        return remarks
    differing = [f"{name} (by {_number(v)})" for name, v in verification.differences.items()]
    more = len(differing) - NAMED_TENSORS
    named = ", ".join(differing[:NAMED_TENSORS])
    remarks.append(f"tensors that differ: {named}" + (f" and {more} more" if more > 0 else ""))
    if verification.departed_at is not None:
        remarks.append(
            f"after {verification.departed_at} steps the replay had other weights than those that "
            "the run's payload was taken at"
        )
    if num_starts > 1:
        remarks.append(
            f"the receiver was started {num_starts} times; the replay has the arguments of the last"
        )
    return remarks


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A temporary directory that stays if the replay fails, with its log in it."""
    directory = Path(tempfile.mkdtemp(prefix="gradient-bridge-verify-"))
    try:
        yield directory
    except JobFailedError:
        raise
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    shutil.rmtree(directory, ignore_errors=True)


def run_verify(args: argparse.Namespace) -> int:
    """Verify a run and print what was found; the exit status."""
    console, errors = Output(), Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        signer = Signer(load_key(args.key_file))
        run = open_run(find_run(args.run_dir, args.runs_dir), args.output_dir, signer)
        with (
            _scratch() as directory,
            Progress(*columns, TimeElapsedColumn(), console=errors) as progress,
        ):
            verification = verify_run(run, directory, progress, args.key_file)
    except (BridgeError, JobFailedError, OSError) as error:
        report_error(error, as_json=args.json, run=args.run_dir)
        return UNUSABLE
    if args.json:
        figures = {"format": FORMAT, **dataclasses.asdict(verification)}
        figures["bitwise_equal"] = verification.bitwise_equal
        figures["largest_difference"] = verification.largest_difference
        print(json.dumps(figures, indent=2))
    else:
        console.print(_table(verification))
        for remark in _remarks(verification, run.payloads.attempt):
            console.print(remark, highlight=False, markup=False, soft_wrap=True)
    return EQUAL if verification.bitwise_equal else DIFFERENT
