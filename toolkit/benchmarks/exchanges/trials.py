"""One row with one seed: its jobs, from their launch to what they reached."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

from toolkit.benchmarks.exchanges.rows import Row, commands
from toolkit.launching import LaunchedJob, launch

_STEP_TAG = "loss/own [per sample]"  # what the recipes log in every step


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a trial found.

    Attributes:
        row: its name.
        seed: of data and weights.
        accuracies: in percent, by head.
        payloads: that the donor published.
        mib: size of all records of both jobs; None where a killed donor has not told its own.
        donor_mib: of them the donor's.
        mean_staleness: of the payloads applied, in receiver steps; None where they have no age.
        training_seconds: from the end of the first step to that of the last one.
    """

    row: str
    seed: int
    accuracies: dict[str, float]
    payloads: int
    mib: float | None
    donor_mib: float | None
    mean_staleness: float | None
    training_seconds: float


class Trial:
    """The jobs of one row and seed.

    Args:
        row: which.
        seed: of data and weights.
        root: a directory for all trials.
        args: ``task``, ``dtype`` and ``max_train_steps`` of all jobs.
    """

    def __init__(self, row: Row, seed: int, root: Path, args: argparse.Namespace) -> None:
        self.row, self.seed = row, seed
        self.name = f"{row.name}, seed {seed}"
        # One evaluation, at the end: it is no part of what a step costs.
        of_all = {"task": args.task, "seed": seed, "dtype": args.dtype, "eval_steps": 10**9}
        training = tuple(x for name, value in of_all.items() for x in (f"--{name}", value))
        steps = ("--max_train_steps", args.max_train_steps)
        self._commands = commands(row, root / f"{row.name}-seed-{seed}", training, steps)
        self._half_way = args.max_train_steps // 2
        self._jobs: dict[str, LaunchedJob] = {}
        self._is_killed = False

    def advance(self) -> bool:
        """Launch what is due, kill what is to be killed; whether all jobs have ended.

        Raises:
            JobFailedError: if a job ended with an error.
        """
        for role, command in self._commands.items():
            if role not in self._jobs:
                name = f"{role} of {self.name}"
                self._jobs[role] = launch(command.recipe, name, command.output_dir, command.flags)
            if self.row.donor_first and not self._has_ended(role):
                return False
        if self.row.donor_killed and not self._is_killed and self.completed_steps > self._half_way:
            os.killpg(self._jobs["donor"].process.pid, signal.SIGKILL)
            self._is_killed = True
        ended = [self._has_ended(role) for role in self._jobs]  # all of them: any may have failed
        return all(ended)

    def _has_ended(self, role: str) -> bool:
        job = self._jobs[role]
        if role == "donor" and self._is_killed:
            return job.process.poll() is not None
        return job.check()

    @property
    def completed_steps(self) -> int:
        """Steps done by the job that is measured, which is the last one."""
        if len(self._jobs) < len(self._commands):
            return 0
        return list(self._jobs.values())[-1].progress()[0]

    def outcome(self) -> Outcome:
        """What was found, once all jobs have ended."""
        *others, measured = self._jobs.values()
        results: dict[str, Any] = measured.results()
        of_donor: dict[str, Any] = others[0].results() if others and not self._is_killed else {}
        payloads = of_donor.get("published_records", 0)
        if self._is_killed:
            payloads = results["fates"]["published"]
        elif self.row.exchange:
            payloads -= 1  # its end
        mine, donors = (
            content.get("published_bytes", 0) / 2**20 for content in (results, of_donor)
        )
        return Outcome(
            row=self.row.name,
            seed=self.seed,
            accuracies=results["accuracies (%)"],
            payloads=payloads,
            mib=None if self._is_killed else mine + donors,
            donor_mib=None if self._is_killed else donors,
            mean_staleness=results.get("mean_staleness (receiver steps)"),
            training_seconds=training_seconds(measured.output_dir),
        )


def training_seconds(directory: Path) -> float:
    """Seconds from the end of a job's first step to that of its last one, by its TensorBoard file.

    What comes before (imports, data, the wait for a donor that is being started) is no cost of a
    way to share.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), {"scalars": 0}).Reload().Scalars(_STEP_TAG)
    return float(events[-1].wall_time - events[0].wall_time)
