"""A run of two jobs that are started again until they are done, and the check of what came out.

Both run the recipes in lockstep, on real files.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

from tests.faults import injected_recipe
from tests.faults.injector import BYTES, Fault, Plan
from tests.faults.joint import joint_weights
from tests.launching import ROOT, Launcher
from tests.oracle import largest_difference
from toolkit.bridge.ledger import read_path
from toolkit.bridge.payload import parse_header

RUN = "0001"
JOBS = ("receiver", "donor")
STEPS = 16  # of a run
HANG_SECONDS = 150.0  # without a fault, a record or a start
PEER_WAIT = 600.0  # longer than any restart takes: nobody may go on alone
TOLERANCE = 1e-11  # against joint training in one process

_WAITING = "waiting for the receiver's next weights"


# -- jobs ---------------------------------------------------------------------------------------


class Handle(Protocol):
    """A job that was started."""

    log: Path

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""

    def kill(self) -> None:
        """End all of its processes."""


class ForkedJob:
    """A recipe in a child of this process."""

    def __init__(self, log: Path, plan: Path, name: str, flags: Sequence[str]) -> None:
        self.log = log
        self._status: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            status = 1
            try:
                os.setsid()
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                injected_recipe.run(plan, name, ROOT / "recipes" / f"{name}.py", list(flags))
                status = 0
            except SystemExit as end:
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
                status = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(status)

    def poll(self) -> int | None:
        """Its exit status, negative if a signal ended it, or None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        if self.poll() is None:
            os.kill(self._pid, signal.SIGKILL)
            while self.poll() is None:
                time.sleep(0.01)


class LaunchedJob:
    """A recipe under ``accelerate launch``, with two ranks."""

    def __init__(self, launcher: Launcher, log: Path, script: Path, *args: object) -> None:
        self.log = log
        self.job = launcher(script, *args, num_processes=2, log=log)

    def poll(self) -> int | None:
        """The launcher's exit status, or None while it runs."""
        return self.job.process.poll()

    def kill(self) -> None:
        """SIGKILL all of its processes."""
        self.job.kill()


# -- one run ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """What a run with faults came to.

    Attributes:
        used: the faults that were put in.
        starts: how often jobs were started.
        rejected: payloads that the receiver refused.
        difference: the largest one of a weight from joint training on the same windows.
        problems: what must not be.
    """

    used: list[Fault]
    starts: int = 0
    rejected: int = 0
    difference: float = float("nan")
    problems: list[str] = dataclasses.field(default_factory=list)


class Run:
    """Two jobs that are started again until they are done.

    Args:
        directory: of the run; must not exist.
        launcher: of real launches, or None to fork.
        faults: to put in.
    """

    steps, checkpointing_steps = STEPS, 3

    def __init__(self, directory: Path, launcher: Launcher | None, faults: Sequence[Fault]) -> None:
        self.directory, self._launcher = directory, launcher
        directory.mkdir(parents=True)
        self._plan = Plan.write(directory / "faults", faults)
        self._handles: dict[str, Handle] = {}
        self._used_before: dict[str, int] = {}  # ending faults of a job when it was started
        self.outcome = Outcome([])

    @property
    def num_processes(self) -> int:
        """Ranks of each job."""
        return 1 if self._launcher is None else 2

    @property
    def run_dir(self) -> Path:
        """What the jobs share."""
        return self.directory / "runs" / RUN

    def flags(self) -> list[str]:
        """Of both recipes."""
        return [
            "--runs_dir", str(self.directory / "runs"), "--run", RUN, "--exchange", "gradient",
            "--dtype", "float64", "--peer_wait", str(PEER_WAIT), "--eval_steps", "10000",
            "--report_to", "none", "--per_device_train_batch_size", "8",
            "--checkpoints_total_limit", "2",
        ]  # fmt: skip

    def receiver_flags(self) -> list[str]:
        """Of the receiver."""
        return [
            *self.flags(), "--max_train_steps", str(self.steps),
            "--checkpointing_steps", str(self.checkpointing_steps), "--keep_payloads",
        ]  # fmt: skip

    def _start(self, name: str) -> None:
        donor_flags = [*self.flags(), "--checkpointing_steps", "5"]
        flags = self.receiver_flags() if name == "receiver" else donor_flags
        if any((self.run_dir / name).glob("step_*")):
            flags += ["--resume_from_checkpoint", "latest"]
        log = self.directory / f"{name}-{self.outcome.starts}.log"
        self.outcome.starts += 1
        self._used_before[name] = self._num_ending(name)
        self._handles[name] = self._launch(name, log, flags)

    def _launch(self, name: str, log: Path, flags: Sequence[str]) -> Handle:
        plan = self._plan.directory
        if self._launcher is None:
            return ForkedJob(log, plan, name, flags)
        script, recipe = Path(injected_recipe.__file__), ROOT / "recipes" / f"{name}.py"
        return LaunchedJob(self._launcher, log, script, plan, name, recipe, *flags)

    def _num_ending(self, name: str) -> int:
        return sum(fault.ends and fault.job == name for fault in self._plan.used())

    def _progress(self) -> tuple[int, ...]:
        records = [
            max(os.listdir(path), default="")
            for name in JOBS
            if (path := self.run_dir / "bridge" / name / "records").is_dir()
        ]
        return (len(self._plan.used()), self.outcome.starts, hash(tuple(records)))

    @property
    def weights(self) -> Path:
        """The receiver's final ones."""
        return self.run_dir / "receiver" / "model.safetensors"

    def finish(self, reference: Path | None) -> None:
        """Train to the end, and check what came out; see :meth:`check`."""
        self.supervise()
        if not self.outcome.problems:
            self.check(reference)

    def supervise(self) -> None:
        """Start both jobs, and again whichever dies, until the receiver and the donor are done."""
        try:
            for name in JOBS:
                self._start(name)
            progress, since = self._progress(), time.monotonic()
            while True:
                if self._look():
                    return
                if (now := self._progress()) != progress:
                    progress, since = now, time.monotonic()
                if time.monotonic() - since > HANG_SECONDS:
                    self._problem(f"nothing has happened for {HANG_SECONDS:g} s", *JOBS)
                    return
                time.sleep(0.02)
        finally:
            for handle in self._handles.values():
                handle.kill()
            self.outcome.used = self._plan.used()

    def _look(self) -> bool:
        """Start again what has died; whether the run is over."""
        statuses = {name: handle.poll() for name, handle in self._handles.items()}
        for name, status in statuses.items():
            if status in (None, 0):
                continue
            if self._num_ending(name) == self._used_before[name]:
                if name == "donor" and "is over" in self._handles[name].log.read_text():
                    continue  # it was started again when the receiver had just ended
                self._problem(f"the {name} ended with status {status} without a fault", name)
                return True
            if not (name == "donor" and statuses["receiver"] == 0):
                self._start(name)
        if statuses["receiver"] != 0:
            return False
        # A donor that was started again when the receiver had just ended may wait for another.
        return statuses["donor"] is not None or _WAITING in self._handles["donor"].log.read_text()

    def _problem(self, what: str, *names: str) -> None:
        logs = [self._handles[name].log for name in names]
        tails = ["\n".join(log.read_text(errors="replace").splitlines()[-40:]) for log in logs]
        self.outcome.problems.append("\n".join([f"{self.directory}: {what}", *tails]))

    def check(self, reference: Path | None) -> None:
        """Compare with joint training and, where no payload was lost, with the run without faults.

        Args:
            reference: that run's weights.
        """
        results = json.loads((self.run_dir / "receiver" / "results.json").read_bytes())
        weights = load_file(self.weights)
        fates = results["fates"]
        self.outcome.rejected = fates["rejected"]
        windows: list[int | None] = [None] * self.steps  # of the donor, by receiver step
        entries = read_path(self.run_dir, results["provenance"]["attempt"])
        refused = collections.Counter(e.receiver_step for e in entries if e.fate == "rejected")
        for entry in entries:
            if entry.fate != "applied":
                continue
            path = self.run_dir / "bridge" / "donor" / "kept" / f"{entry.sequence:010d}.safetensors"
            header = parse_header(path.read_bytes())
            self._expect(windows[entry.receiver_step], None, f"before {path.name} at its step")
            windows[entry.receiver_step] = header.donor_step - 1
            self._expect(header.tensors_digest, entry.digest, f"digest of {path.name}")
            self._expect(header.receiver_step, entry.receiver_step, f"step of {path.name}")
        alone = [step for step, window in enumerate(windows) if window is None]
        self._expect([s for s in alone if refused[s] < 2], [], "steps alone, not refused twice")
        taken = [window for window in windows if window is not None]
        lost = max(taken) + 1 - len(taken)
        damaged = [f for f in self.outcome.used if f.job == "donor" and f.action in BYTES]
        self._expect(sorted(set(taken)), taken, "the donor's windows, in order")
        self._expect(lost <= fates["rejected"], True, f"windows lost by rejections only ({lost})")
        self._expect(fates["rejected"] <= len(damaged), True, "only damaged payloads rejected")
        numbers = [entry.sequence for entry in entries]
        self._expect(sorted(set(numbers)), numbers, "numbers with a fate, in order")
        self._expect(results["completed_steps"], self.steps, "completed steps")
        self._expect(results["steps_alone"], len(alone), "steps alone")
        settled = sum(fates[f] for f in ("applied", "dropped", "rejected", "skipped", "pending"))
        self._expect(settled, fates["published"], "payloads with a fate")
        self._expect(fates["applied"], len(taken), "payloads applied")
        if self.outcome.problems:
            return
        joint = joint_weights(self.receiver_flags(), self.num_processes, windows)
        self.outcome.difference = largest_difference(weights, joint)
        if not self.outcome.difference <= TOLERANCE:
            self._expect(self.outcome.difference, f"<= {TOLERANCE}", "difference from joint")
        if reference is not None and windows == list(range(self.steps)):
            other = load_file(reference)
            same = all(torch.equal(weights[name], other[name]) for name in other)
            self._expect(same, True, "bitwise the weights of the run without faults")
        for name in JOBS:  # of a start that was the last one, at most
            left = list((self.run_dir / "bridge" / name / "records").glob(".tmp-*"))
            self._expect(len(left) <= 1, True, f"nothing half written of the {name}: {left}")

    def _expect(self, found: object, wanted: object, what: str) -> None:
        if found != wanted:
            self.outcome.problems.append(f"{self.directory}: {what}: {found}, not {wanted}")


# -- commands -----------------------------------------------------------------------------------


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """A command's line, with the flags that all have; ``output`` is there."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a directory; a temporary one by default")
    args = parser.parse_args()
    args.output = args.output or Path(tempfile.mkdtemp(prefix="faults-"))
    args.output.mkdir(parents=True, exist_ok=True)
    return args


def conclude(report: Mapping[str, Any], outcomes: Sequence[Outcome], output: Path) -> None:
    """Print what a command found, and leave it in ``output``; a problem is an exit status of 1."""
    problems = [problem for outcome in outcomes for problem in outcome.problems]
    content = {
        **report,
        "largest difference from joint training": max(o.difference for o in outcomes),
        "problems": len(problems),
    }
    print(json.dumps(content, indent=1))
    (output / "report.json").write_text(json.dumps(content | {"texts": problems}, indent=1))
    if problems:
        sys.exit(f"{len(problems)} problems: see {output / 'report.json'}")
