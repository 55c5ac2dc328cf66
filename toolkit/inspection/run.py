"""One look at a run of the bridge: who is there, what lies on the disk, what became of it.

It only reads. Jobs may run meanwhile, so what was listed may be gone when it is read; and a run may
be damaged.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from toolkit.bridge.agreement import (
    attempts_of,
    donors_of,
    has_ended,
    open_bridge,
    read_claim,
)
from toolkit.bridge.authentication import Signer
from toolkit.bridge.class_names import stated_classes
from toolkit.bridge.config import JOB_NAME
from toolkit.bridge.errors import BridgeError, PayloadError
from toolkit.bridge.ledger import Entry, read_path
from toolkit.bridge.liveness import BEAT_SECONDS, PeerWatch
from toolkit.bridge.own_weights import donors_with_weights, stream_of
from toolkit.bridge.payload import Header
from toolkit.bridge.reasons import UNKNOWN, State
from toolkit.bridge.signed_files import SignedFiles
from toolkit.bridge.transport import DirectoryTransport
from toolkit.inspection.fates import numbers_present, settle_books
from toolkit.inspection.files import Listing
from toolkit.inspection.report import Fates, Job, Run, Stream, TemporaryFile

T = TypeVar("T")

# What reading a damaged file can raise.
_DAMAGE = (OSError, ValueError, TypeError, KeyError, RecursionError, BridgeError)


class Look:
    """One look at one run. It begins to watch the jobs' hearts when it is made.

    Args:
        run_dir: the run's directory.
        signer: of this process, with the run's key if it has one.

    Attributes:
        transport: the run's transport.
        path: the ledger on the way to the receiver's present weights.
        record_bytes: the size of a record, at most, as the jobs say; 0 if they do not.
    """

    def __init__(self, run_dir: Path, signer: Signer) -> None:
        self.run_dir, self._signer = run_dir, signer
        self._problems: list[str] = []
        found = self._try(run_dir.name, lambda: open_bridge(run_dir, signer))
        self.transport = found or DirectoryTransport(run_dir / "bridge", signer)
        self.path: list[Entry] = []
        self.record_bytes = 0
        self._listing = self._before = Listing(self.transport.root)
        self._watches = {job: PeerWatch(self.transport, job) for job in self._jobs()}
        self._had_ended = {job for job in self._watches if self._has_ended(job)}

    def is_clear(self, watched_seconds: float) -> bool:
        """Observe all jobs once; whether longer watching would tell nothing new."""
        is_clear = True
        for job, watch in self._watches.items():
            watch.observe()
            # One that has ended may have been started again, and have published nothing yet.
            ended = job in self._had_ended and watched_seconds >= 2 * BEAT_SECONDS
            is_clear = is_clear and (watch.seen or ended)
        return is_clear

    def report(self) -> Run:
        """What the run is now. Call it once, after the watch."""
        self._listing = listing = Listing(self.transport.root)
        for error in listing.errors:
            self._note(f"{error.filename} cannot be listed: {error.strerror}")
        for path in listing.special():
            if path.suffix != ".safetensors":  # a reader puts aside what stands for a record
                self._note(f"{self._name(path)} is no plain file")
        terms = self._read_terms()
        fates = self._fates()  # streams first, then the ledger
        for books in fates:
            self._check(books)
        jobs = self._jobs()
        is_alone = len({job == "receiver" for job in jobs}) == 1
        return Run(
            directory=str(self.run_dir),
            name=self.run_dir.name,
            run_id=_text(terms.get("run_id")),
            exchange=_text(terms.get("exchange")),
            class_names=self._try("heads", lambda: stated_classes(self.transport.small)) or {},
            jobs=[self._job(job, is_alone) for job in jobs],
            streams=self._streams(),
            fates=fates,
            num_bytes=listing.num_bytes(listing.root),
            temporary_files=[
                TemporaryFile(path=self._name(path), num_bytes=size)
                for path, size in listing.temporary().items()
                if self._before.temporary().get(path) == size
            ],
            verified=None,
            problems=self._problems,
        )

    def kept(self, stream: str) -> list[Path]:
        """The records of a stream that have a name which nobody deletes."""
        below = map(Path, self._listing.below(self.transport.kept_path(stream, 0).parent))
        return [path for path in below if path.stem.isdecimal()]

    # -- jobs -------------------------------------------------------------------------------

    def _jobs(self) -> list[str]:
        """All jobs that have claimed a place or opened a stream, the receiver first."""
        donors = {*donors_of(self.transport), *self._donor_streams()}
        there = "receiver" in self.transport.streams() or attempts_of(self.transport, "receiver")
        return [*(["receiver"] if there else []), *sorted(donors)]

    def _donor_streams(self) -> list[str]:
        names = self.transport.streams()
        return [name for name in names if name != "receiver" and JOB_NAME.fullmatch(name)]

    def _has_ended(self, job: str) -> bool:
        return self._try(job, lambda: has_ended(self.transport, job)) or False

    def _job(self, job: str, is_alone: bool) -> Job:
        claim = self._claim(job)
        if type(size := claim.get("record_bytes")) is int:
            self.record_bytes = max(size, self.record_bytes)
        heads, pid = claim.get("heads"), claim.get("pid")
        newest = self._newest_header(job)
        is_donor = job != "receiver"
        return Job(
            name=job,
            role="donor" if is_donor else "receiver",
            heads=[str(head) for head in heads] if isinstance(heads, list) else [],
            compression=_text(claim.get("compression")) if is_donor else None,
            start=max(attempts_of(self.transport, job), default=0),
            state=self._state(job, is_alone),
            receiver_step=newest.receiver_step if newest else None,
            donor_step=newest.donor_step if newest and is_donor else None,
            host=_text(claim.get("host")),
            pid=pid if type(pid) is int else None,
        )

    def _state(self, job: str, is_alone: bool) -> State:
        watch = self._watches.get(job)
        # A job that has come since the watch began has shown life by that.
        seen = watch is None or watch.seen
        if self._has_ended(job) and not (seen and job in self._had_ended):
            return "ended"
        if not seen:
            return "silent"
        return "waiting" if is_alone else "alive"

    def _claim(self, job: str) -> dict[str, Any]:
        return self._try(f"the claim of the {job}", lambda: read_claim(self.transport, job)) or {}

    def _newest_header(self, job: str) -> Header | None:
        newest = max(self._try(job, lambda: self.transport.sequences(job)) or [], default=-1)
        try:
            return self.transport.read_header(job, newest)
        except (FileNotFoundError, PayloadError):
            return None

    # -- streams and fates --------------------------------------------------------------------

    def _streams(self) -> list[Stream]:
        names = self.transport.streams()
        reports = [self._try(name, functools.partial(self._stream, name)) for name in names]
        return [report for report in reports if report is not None]

    def _stream(self, name: str) -> Stream:
        transport, directory = self.transport, self.transport.root / name
        sequences, rejected = transport.sequences(name), transport.rejected(name)
        reasons = Counter(transport.rejection(name, number) or UNKNOWN for number in rejected)
        carries: Literal["payloads", "weights", "own weights"] = "payloads"
        if name == "receiver":
            carries = "weights"
        elif name in map(stream_of, donors_with_weights(transport)):
            carries = "own weights"
        return Stream(
            name=name,
            carries=carries,
            published=max([*sequences, *rejected], default=-1) + 1,
            present=len(sequences),
            num_bytes=self._listing.num_bytes(directory),
            acknowledged=transport.acknowledged(name),
            rejected=dict(sorted(reasons.items())),
            kept=len(self.kept(name)),
            alien=transport.alien_names(name),
        )

    def _fates(self) -> list[Fates]:
        transport, donors = self.transport, self._donor_streams()
        numbers = functools.partial(numbers_present, transport)
        present = {d: self._try(d, functools.partial(numbers, d)) for d in donors}
        newest = max(attempts_of(transport, "receiver"), default=0)
        path = self._try("the ledger", lambda: read_path(self.run_dir, newest))
        if path is None:
            return []
        self.path = path
        # A replay has a ledger, and no stream.
        present |= {donor: (set(), 0) for donor in {e.donor for e in path} - set(donors)}
        settled = [
            self._try(donor, functools.partial(settle_books, transport, donor, *found, path))
            for donor, found in sorted(present.items())
            if found is not None
        ]
        return [books for books in settled if books is not None]

    def _check(self, books: Fates) -> None:
        if books.unaccounted:
            numbers = ", ".join(map(str, books.unaccounted))
            self._note(f"payloads of the {books.donor} have no fate, though passed over: {numbers}")
        if books.repeated:
            numbers = ", ".join(map(str, books.repeated))
            self._note(f"payloads of the {books.donor} have more than one fate: {numbers}")

    # -- reading what may be damaged ------------------------------------------------------------

    def _read_terms(self) -> dict[str, Any]:
        content = SignedFiles(self.transport.root, self._signer).read("run.json")
        if content is None:
            if self._listing.statuses and not self._problems:
                self._note("bridge/run.json cannot be read")
            return {}
        return self._try("bridge/run.json", lambda: dict(json.loads(content))) or {}

    def _try(self, what: str, read: Callable[[], T | None]) -> T | None:
        try:
            return read()
        except _DAMAGE as error:
            self._note(f"{what} cannot be read: {error}")
            return None

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.run_dir))

    def _note(self, problem: str) -> None:
        if problem not in self._problems:
            self._problems.append(problem)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
