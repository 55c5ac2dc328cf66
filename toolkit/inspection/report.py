"""What ``gradient-bridge inspect`` reports: the shape of its JSON, and no more than that.

``--json`` prints a :class:`Report` as one object. While ``format`` is 1, fields may be added, but
none goes away or changes its meaning. Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from toolkit.bridge.reasons import Rejection, State

FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One job of a run, as its newest start says and as it was seen to live.

    Attributes:
        name: of the job, and of its stream.
        role: ``donor`` or ``receiver``.
        heads: that it shares beside the backbone.
        compression: of a donor's payloads; None for a receiver, and if it does not say.
        start: which start of the job is the newest, from 1; 0 if none is on record.
        state: judged by whether its heartbeat counter moved while it was watched.
        receiver_step: receiver steps at its newest record; None without one that can be read.
        donor_step: the same in steps of the donor; None for a receiver.
        host: on which it was started, as it says; None if it does not.
        pid: of its main process there.
    """

    name: str
    role: Literal["donor", "receiver"]
    heads: list[str]
    compression: str | None
    start: int
    state: State
    receiver_step: int | None
    donor_step: int | None
    host: str | None
    pid: int | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """The records that one job publishes under one name.

    Attributes:
        name: of the stream.
        carries: payloads of a donor, weights of the receiver, or a donor's own weights.
        published: the newest record's number plus one: numbers used so far, for ends too.
        present: records that are there; the others were deleted, or refused and moved.
        num_bytes: of all its files, those with two names counted once.
        acknowledged: its reader needs nothing below this number.
        rejected: records that a reader refused, as far as they still lie aside (the newest do),
            counted by the reason.
        kept: records with a second name that nobody deletes.
        alien: names among the records that are no record.
    """

    name: str
    carries: Literal["payloads", "weights", "own weights"]
    published: int
    present: int
    num_bytes: int
    acknowledged: int
    rejected: dict[str, int]
    kept: int
    alien: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fates:
    """What became of a donor's payloads on the way to the receiver's present weights.

    Attributes:
        donor: its name.
        published: payloads that the receiver had to settle, counted from their numbers: without
            ends, and without those that only an earlier start of the receiver has settled.
        applied: fates in the receiver's ledger.
        dropped: see there.
        rejected: see there.
        skipped: see there.
        pending: payloads in the stream that have no fate yet.
        settled_before: fates of an earlier start that the present weights do not come from.
        reasons: of the fates that have one, how many for each reason, by fate.
        unaccounted: numbers of payloads that were passed over or acknowledged without a fate; the
            first few.
        repeated: numbers with more than one fate; the first few.
    """

    donor: str
    published: int
    applied: int
    dropped: int
    rejected: int
    skipped: int
    pending: int
    settled_before: int
    reasons: dict[str, dict[str, int]]
    unaccounted: list[int]
    repeated: list[int]

    @property
    def adds_up(self) -> bool:
        """Whether applied + dropped + rejected + skipped + pending = published."""
        settled = self.applied + self.dropped + self.rejected + self.skipped
        return settled + self.pending == self.published


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TemporaryFile:
    """A file that a job began, and that was the same at the beginning and the end of the watch."""

    path: str  # within the run
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BadRecord:
    """A record that is not what it claims to be, or that cannot be read."""

    path: str  # within the run
    reason: Rejection
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What reading every record in full came to.

    Attributes:
        num_records: read; those that were deleted meanwhile do not count.
        num_bytes: read.
        bad: the records that failed.
    """

    num_records: int
    num_bytes: int
    bad: list[BadRecord]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run.

    Attributes:
        directory: of the run.
        name: of the run.
        run_id: None if it cannot be read.
        exchange: what crosses; None if it cannot be read.
        class_names: by head, the names of its classes, where a job has stated them.
        jobs: the receiver first.
        streams: in the order of their names.
        fates: of each donor's payloads; none if the ledger cannot be read.
        num_bytes: of all that the jobs share, files with two names counted once.
        temporary_files: left behind by a crash, or slowly written by a job that lives.
        verified: None without ``--verify``.
        problems: a sentence for each thing that is wrong.
    """

    directory: str
    name: str
    run_id: str | None
    exchange: str | None
    class_names: dict[str, list[str]]
    jobs: list[Job]
    streams: list[Stream]
    fates: list[Fates]
    num_bytes: int
    temporary_files: list[TemporaryFile]
    verified: Verified | None
    problems: list[str]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with it."""
        return not self.problems


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All that was asked for.

    Attributes:
        format: of this object.
        directory: as it was given.
        watched_seconds: how long heartbeats were watched.
        runs: in the order of their names.
    """

    format: int
    directory: str
    watched_seconds: float
    runs: list[Run]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with any run."""
        return all(run.ok for run in self.runs)

    def as_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints: all fields, ``ok`` of all and of each run, and
        ``adds_up`` of each donor's fates.
        """
        content: dict[str, Any] = {"ok": self.ok, **dataclasses.asdict(self)}
        for run, shown in zip(self.runs, content["runs"], strict=True):
            shown["ok"] = run.ok
            for fates, figures in zip(run.fates, shown["fates"], strict=True):
                figures["adds_up"] = fates.adds_up
        return content
