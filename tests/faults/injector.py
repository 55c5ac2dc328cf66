"""Faults at named points of a job, each of them used once, whatever restarts follow.

A plan is a list of faults in a directory that all processes of all starts share. A process that
reaches a point looks for an unused fault of its job, rank and point whose step has come, creates
the file that marks it as used, and only then does what it says. It is done at most once.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from toolkit import GradientDonor, GradientReceiver, checkpoints
from toolkit.bridge import files
from toolkit.bridge.injection import Injector as GradientInjector
from toolkit.bridge.job import BridgeJob
from toolkit.bridge.ledger import Ledger
from toolkit.bridge.transport import DirectoryTransport

START = -1  # the step of a job that has joined no run yet

# What a main process does with a record of its own, in this order (``files.create``).
PUBLISH = (
    "publish: nothing written",
    "publish: half written",
    "publish: written",
    "publish: synced",
    "publish: linked",
    "publish: temporary name removed",
    "publish: directory synced",
)
# The system call that comes next at these points may fail.
FAILING = ("publish: nothing written", "publish: written", "publish: synced", PUBLISH[5])
_CHECKPOINT = ("checkpoint: begun", "checkpoint: half written", "checkpoint: written",
               "checkpoint: complete")  # fmt: skip
# By job: the points of its main process alone, and those of every rank.
MAIN_POINTS = {
    "donor": (*PUBLISH, "prune: begun", "prune: one deleted", "prune: done"),
    "receiver": (
        *PUBLISH, "prune: begun", "prune: one deleted", "prune: done", "acknowledge: begun",
        "acknowledge: done", "keep: begun", "keep: done", "ledger: begun", "ledger: half a line",
        "ledger: done",
    ),
}  # fmt: skip
RANK_POINTS = {
    "donor": ("attach: begun", "attach: done", "read: done", "weights: loaded", "window: computed",
              "end: begun", "end: done", *_CHECKPOINT),
    "receiver": (
        "attach: begun", "attach: done", "resume: done", "read: done", "inject: begun",
        "inject: done", "optimizer: begun", "optimizer: done", "commit: begun", "commit: done",
        "end: begun", "end: done", *_CHECKPOINT,
    ),
}  # fmt: skip
KILL, STOP, DELAY = "kill", "stop", "delay"
ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "ESTALE", "EACCES")
BYTES = ("truncate", "flip a bit", "zero a page", "empty")

_PAUSE_SECONDS = 0.7  # of a job that is stopped or slow


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        job: ``donor`` or ``receiver``.
        rank: the process of that job.
        step: the receiver step (of a donor: the one its window is for) from which on it is due.
        point: one of ``MAIN_POINTS`` or ``RANK_POINTS``.
        action: ``kill``, ``stop`` (for a while), ``delay``, one of ``ERRORS`` (at ``FAILING``) or
            of ``BYTES`` (at "publish: written").
    """

    job: str
    rank: int
    step: int
    point: str
    action: str

    @property
    def ends(self) -> bool:
        """Whether the job may end of it."""
        return self.action == KILL or self.action in ERRORS


class Plan:
    """The faults of a run, in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        rows = json.loads((directory / "plan.json").read_bytes())
        self.faults = [Fault(**row) for row in rows]

    @classmethod
    def write(cls, directory: Path, faults: Iterable[Fault]) -> Plan:
        """Begin a plan of which nothing is used."""
        (directory / "used").mkdir(parents=True)
        rows = [dataclasses.asdict(fault) for fault in faults]
        (directory / "plan.json").write_text(json.dumps(rows, indent=1))
        return cls(directory)

    def used(self) -> list[Fault]:
        """The faults that have been used."""
        numbers = sorted(int(name) for name in os.listdir(self.directory / "used"))
        return [self.faults[number] for number in numbers]

    def take(self, number: int) -> bool:
        """Mark a fault as used; False if it was before."""
        try:
            os.close(os.open(self.directory / "used" / str(number), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


class Injector:
    """Puts a plan's faults into this process.

    Args:
        plan: with the faults of all jobs.
        job: the one that this process is of.
        rank: this process.
    """

    def __init__(self, plan: Plan, job: str, rank: int) -> None:
        self._plan = plan
        self._mine = {
            number: fault
            for number, fault in enumerate(plan.faults)
            if (fault.job, fault.rank) == (job, rank)
        }
        self._step: Callable[[], int] = lambda: START
        self._record = threading.local()  # the one that is being published, on this thread

    def reach(self, point: str, path: Path | None = None) -> None:
        """This process is at ``point``; ``path`` is the file that is at stake, if there is one."""
        step = self._step()
        for number, fault in self._mine.items():
            if fault.point == point and fault.step <= step and self._plan.take(number):
                _act(fault, path)
                return

    def arm(self) -> None:
        """Put the points in. For good: the process is the job's."""
        self._arm_publishing()
        self._around(DirectoryTransport, "prune", "prune")
        self._after_unlinking()
        self._around(DirectoryTransport, "acknowledge", "acknowledge")
        self._around(DirectoryTransport, "keep", "keep")
        self._around(Ledger, "flush", "ledger")
        self._halve_a_line()
        self._follow_steps()
        self._around(BridgeJob, "_read_now", "read")
        self._around(GradientDonor, "_load", "weights", done="weights: loaded")
        self._around(GradientDonor, "_publish_window", "window", begun="window: computed")
        self._around(GradientReceiver, "_on_load_state", "resume")
        self._around(GradientInjector, "inject", "inject")
        self._around(AcceleratedOptimizer, "step", "optimizer")
        self._around(GradientReceiver, "commit", "commit")
        self._around(BridgeJob, "close", "end")
        # Recipes import this one by name, later.
        self._around(checkpoints, "save_checkpoint", "checkpoint", done="checkpoint: complete")
        self._around(BridgeJob, "_on_save_state", "", done="checkpoint: half written")
        self._around(Accelerator, "save_state", "", done="checkpoint: written")

    def _around(
        self, owner: Any, name: str, stem: str, begun: str | None = None, done: str | None = None
    ) -> None:
        """Reach a point before and after every call of a function."""
        original = getattr(owner, name)
        before, after = begun or f"{stem}: begun", done or f"{stem}: done"

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.reach(before)
            result = original(*args, **kwargs)
            self.reach(after)
            return result

        setattr(owner, name, wrapped)

    def _follow_steps(self) -> None:
        """Know the step of the job from when on it has joined a run."""
        original = BridgeJob._attach

        def attach(job: BridgeJob) -> None:
            self.reach("attach: begun")
            original(job)
            self.reach("attach: done")
            attribute = "receiver_step" if job.role == "donor" else "completed_steps"
            self._step = lambda: getattr(job, attribute, START)

        BridgeJob._attach = attach  # type: ignore[method-assign,assignment]

    def _arm_publishing(self) -> None:
        create, fsync, link = files.create, files.fsync_path, os.link

        def create_record(path: Path, write: Callable[[Path], object]) -> int:
            if path.parent.name != "records":
                return create(path, write)

            def write_record(temporary: Path) -> None:
                self.reach("publish: nothing written", temporary)
                write(temporary)
                self.reach("publish: half written", temporary)
                self.reach("publish: written", temporary)

            self._record.path = path
            try:
                size = create(path, write_record)
            finally:
                self._record.path = None
            self.reach("publish: directory synced", path)
            return size

        def fsync_path(path: Path) -> None:
            record = getattr(self._record, "path", None)
            if record is not None and path == record.parent:
                self.reach("publish: temporary name removed", record)
            fsync(path)
            if record is not None and path != record.parent:
                self.reach("publish: synced", path)

        def link_record(source: Any, target: Any, **options: Any) -> None:
            link(source, target, **options)
            if getattr(self._record, "path", None) is not None:
                self.reach("publish: linked", Path(target))

        files.create, files.fsync_path = create_record, fsync_path
        os.link = link_record  # type: ignore[assignment]

    def _after_unlinking(self) -> None:
        unlink = Path.unlink

        def unlink_record(path: Path, missing_ok: bool = False) -> None:
            unlink(path, missing_ok)
            is_temporary = path.name.startswith(files.TEMPORARY_PREFIX)
            if path.parent.name == "records" and not is_temporary:
                self.reach("prune: one deleted", path)

        Path.unlink = unlink_record  # type: ignore[method-assign,assignment]

    def _halve_a_line(self) -> None:
        flush = Ledger.flush

        def flush_half(ledger: Ledger) -> None:
            if ledger._unwritten and ledger._path is not None:
                self.reach("ledger: half a line", ledger._path)
            flush(ledger)

        Ledger.flush = flush_half  # type: ignore[method-assign,assignment]


def _act(fault: Fault, path: Path | None) -> None:
    if fault.point == "publish: half written" and path is not None:
        os.truncate(path, path.stat().st_size // 2)
    if fault.point == "ledger: half a line" and path is not None:
        with path.open("a") as file:
            file.write('{"donor": "don')
    if fault.action == KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.action == STOP:
        wake = f"sleep {_PAUSE_SECONDS}; kill -CONT {os.getpid()}"
        subprocess.Popen(["/bin/sh", "-c", wake], start_new_session=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.action == DELAY:
        time.sleep(_PAUSE_SECONDS)
    elif fault.action in ERRORS:
        number = getattr(errno, fault.action)
        raise OSError(number, f"{os.strerror(number)} (injected)", str(path))
    elif path is not None:
        _damage(path, fault.action)


def _damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    if how == "truncate":
        del data[middle:]
    elif how == "flip a bit":
        data[middle] ^= 1
    elif how == "zero a page":
        data[-4096:] = bytes(len(data[-4096:]))
    elif how == "empty":
        data.clear()
    else:
        raise ValueError(f"unknown action {how!r}")
    path.write_bytes(data)
