"""Any order of payloads, steps, kills and resumes: every payload has one fate, for the weights.

A receiver without a model reads two donors in lockstep with all that keeps its books: ``Donors``,
``Inbox``, ``Ledger`` and ``CheckpointCursors``. Its weights are the list of what was applied, so
that a resume that applies a payload twice, or not at all, has other weights.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.faults.killed import NUM_CHANGES, Killed, killed_after
from tests.unit.keys import SIGNER
from toolkit.bridge import inbox as inbox_module
from toolkit.bridge.authentication import UNSIGNED
from toolkit.bridge.digests import digest_tensors
from toolkit.bridge.donors import Donors
from toolkit.bridge.errors import PayloadError
from toolkit.bridge.inbox import MISSING_LOOKS, MISSING_SECONDS, Inbox, Verdict
from toolkit.bridge.ledger import Ledger
from toolkit.bridge.liveness import PeerWatch, Wait
from toolkit.bridge.payload import Header, Record, check_identity, parse_record
from toolkit.bridge.publisher import Publisher
from toolkit.bridge.retention import CheckpointCursors
from toolkit.bridge.runs import CHECKPOINT_FILE
from toolkit.bridge.sentinel import Sentinel
from toolkit.bridge.transport import DirectoryTransport

JOBS = ("donor", "east")
HEAD = "heads.h2"
EXPECTED = {HEAD: {"w": torch.zeros(3)}}
LIMIT = 10_000
GOOD = ("good", "good", "good", "late", "other weights", "skip")
BAD = ("damaged", "not finite", "wrong shape", "another run's", "lost", "end")
jobs = st.sampled_from(JOBS)
deaths = st.one_of(st.none(), st.none(), st.none(), st.integers(0, NUM_CHANGES))


@dataclasses.dataclass
class Weights:
    """The receiver's, and what has led to them.

    Attributes:
        applied: payloads in the order of their steps: step, donor, number.
        fates: by donor and number.
        step: completed steps.
    """

    applied: list[tuple[int, str, int]] = dataclasses.field(default_factory=list)
    fates: dict[tuple[str, int], str] = dataclasses.field(default_factory=dict)
    step: int = 0

    def digest(self) -> str:
        return hashlib.sha256(repr((self.step, self.applied)).encode()).hexdigest()


@dataclasses.dataclass
class Published:
    """What a donor, or a stranger, put under a number."""

    kind: str
    at: tuple[int, str]  # step and digest of the weights
    digest: str = ""  # of its tensors


@dataclasses.dataclass
class Checkpoint:
    path: Path
    weights: Weights
    state: str
    counts: dict[str, dict[str, int]]


class Patience:
    """A wait that is given up when the machine says so."""

    def __init__(self, machine: FatesMachine) -> None:
        self.machine = machine

    def gave_up(self) -> str | None:
        return "enough" if self.machine.is_impatient else None

    def is_over(self) -> None:
        pass


class FatesMachine(RuleBasedStateMachine):
    """Two donors, a receiver with checkpoints, and what may go wrong between them."""

    directory: Path
    covered: Counter[str]  # what has happened, in all examples

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=self.directory))
        (self.root / "bridge").mkdir()
        self.now, self.is_impatient, self.value = 1000.0, False, 0.0
        clock = SimpleNamespace(monotonic=lambda: self.now)
        self.patch = mock.patch.object(inbox_module, "time", clock)
        self.patch.start()
        self.published: dict[str, dict[int, Published]] = {job: {} for job in JOBS}
        self.refused: set[tuple[str, int]] = set()  # by another rank
        self.weights, self.before = Weights(), (0, "")
        self.checkpoints: list[Checkpoint] = []
        self.num_saved = 0

    def teardown(self) -> None:
        self.patch.stop()
        shutil.rmtree(self.root)

    @initialize(has_key=st.booleans(), will_save=st.booleans())
    def start(self, has_key: bool, will_save: bool) -> None:
        self.signer, self.will_save = SIGNER if has_key else UNSIGNED, will_save
        self.writers = {job: self.start_writer(job) for job in JOBS}
        self.start_receiver()

    # -- the donors -------------------------------------------------------------------------------

    def start_writer(self, job: str) -> Publisher:
        transport = DirectoryTransport(self.root / "bridge", self.signer)
        return Publisher(transport, job, "run", LIMIT)

    @rule(job=jobs)
    def restart_donor(self, job: str) -> None:
        self.writers[job] = self.start_writer(job)

    @rule(job=jobs, kind=st.sampled_from(GOOD), after=deaths)
    def publish(self, job: str, kind: str, after: int | None) -> None:
        """A payload or a skip; the donor may die on the way, and starts again."""
        self.donate(job, kind, after)

    @rule(num_steps=st.integers(1, 4))
    def train(self, num_steps: int) -> None:
        """Some steps in which nothing goes wrong."""
        for _ in range(num_steps):
            for job in JOBS:
                self.donate(job, "good", None)
            self.step("step")

    @rule(job=jobs, kind=st.sampled_from(BAD))
    def publish_badly(self, job: str, kind: str) -> None:
        self.donate(job, kind, None)

    def donate(self, job: str, kind: str, after: int | None) -> None:
        at = (self.weights.step, self.weights.digest())
        if kind == "late":
            at = self.before
        elif kind == "other weights":
            at = (at[0], "other")
        self.value += 1
        tensors = {"w": torch.full((3,), self.value)}
        if kind == "not finite":
            tensors["w"][1] = torch.nan
        elif kind == "wrong shape":
            tensors["w"] = torch.zeros(4)
        elif kind in ("skip", "end"):
            tensors = {}
        header = Header(
            kind="skip" if kind == "skip" else "end" if kind == "end" else "gradient",
            run_id="another run" if kind == "another run's" else "run", job=job, attempt=1,
            receiver_step=at[0], weights_digest=at[1], head=HEAD, count=4.0,
        )  # fmt: skip
        self.prune(job)
        writer = self.writers[job]
        before = set(self.transport.sequences(job))
        try:
            with contextlib.nullcontext() if after is None else killed_after(after):
                writer.publish(header, tensors)
        except Killed:
            self.covered["killed"] += 1
            self.restart_donor(job)
        new = set(self.transport.sequences(job)) - before
        for number in new:
            # Where the disk has lost the newest record, nothing tells that there was one.
            earlier = self.published[job].get(number)
            assert earlier is None or earlier.kind == "lost", "a number came twice"
            self.published[job][number] = Published(kind, at, digest_tensors(tensors))
            path = self.transport.path(job, number)
            if kind == "damaged":
                path.write_bytes(path.read_bytes()[:-5])
            elif kind == "lost":
                path.unlink()

    @rule(job=jobs, ahead=st.integers(0, 2))
    def alien(self, job: str, ahead: int) -> None:
        """A stranger's file in the place of a record that is still to come."""
        number = self.writers[job].next_sequence + ahead
        path = self.transport.path(job, number)
        if not path.exists() and number not in self.published[job]:
            path.write_bytes(b"no payload")
            self.published[job][number] = Published("alien", (0, ""))

    def prune(self, job: str) -> None:
        num_before = len(self.transport.sequences(job))
        self.writers[job].prune(self.transport.acknowledged(job))
        self.covered["pruned"] += num_before - len(self.transport.sequences(job))

    # -- the receiver -----------------------------------------------------------------------------

    def start_receiver(self) -> None:
        self.transport = DirectoryTransport(self.root / "bridge", self.signer)
        self.ledger = Ledger(None)
        self.donors = Donors(
            self.transport,
            open_inbox=self.open_inbox,
            open_wait=self.open_wait,
            head_of=lambda donor: HEAD,
            num_expected=len(JOBS),
            max_staleness=0,
            peer_wait=60.0,
        )
        self.retention = CheckpointCursors(self.transport, "run", will_save=self.will_save)
        self.retention.saved_below(self.root / "checkpoints")
        self.begin_step()

    def begin_step(self) -> None:
        self.donors.remember(self.weights.step, self.weights.digest())
        self.donors.begin()
        self.is_impatient = False

    def open_inbox(self, donor: str, digests: Mapping[int, str], is_new: bool) -> Inbox:
        def read(sequence: int) -> Record:
            data = self.transport.read(donor, sequence, max_bytes=LIMIT)
            record = parse_record(data, self.signer)
            check_identity(record.header, run_id="run", job=donor, sequence=sequence)
            return record

        return Inbox(
            donor, transport=self.transport, read=read, expected=EXPECTED, kind="gradient",
            unit="samples", sentinel=Sentinel(donor, []), max_staleness=0, digests=digests,
            is_new=is_new,
        )  # fmt: skip

    def open_wait(self, peer: PeerWatch, what: str) -> Wait:
        return Patience(self)  # type: ignore[return-value]

    def look(self) -> tuple[Verdict, ...] | None:
        """Look as often as it takes to take a number for lost."""
        for _ in range(2 * MISSING_LOOKS):
            if (verdicts := self.donors.look(self.weights.step)) is not None:
                return verdicts
            self.now += MISSING_SECONDS
        return None

    @rule(outcome=st.sampled_from(["step", "step", "step", "overflow", "a rank refuses"]))
    def step(self, outcome: str) -> None:
        verdicts = self.look()
        if verdicts is None:
            return
        if outcome == "overflow":  # the step does not happen: all is pending for the next try
            self.donors.begin()
            return
        if outcome == "a rank refuses":
            for verdict in verdicts:
                if verdict.digest is not None:
                    self.donors.reject(verdict, PayloadError("unreadable", "on another rank"))
                    self.refused.add((verdict.donor, verdict.sequence))
            return
        self.before = (self.weights.step, self.weights.digest())
        entries = self.donors.settle(verdicts)
        self.ledger.note(entries)
        self.ledger.flush()
        for entry in entries:
            self.check_fate(entry.donor, entry.sequence, entry.fate, entry.digest)
        self.weights.step += 1
        self.retention.acknowledge(self.donors.cursors())
        self.begin_step()

    def check_fate(self, donor: str, number: int, fate: str, digest: str) -> None:
        """One fate, and the right one."""
        self.covered[fate] += 1
        assert (donor, number) not in self.weights.fates, "a second fate"
        self.weights.fates[donor, number] = fate
        published = self.published[donor].get(number)
        is_sound = published is not None and published.kind in GOOD
        if fate == "rejected":
            assert not is_sound or (donor, number) in self.refused
            return
        assert published is not None
        assert is_sound
        is_present = published.at == self.before
        assert (fate == "dropped") == (not is_present)
        if fate == "applied":
            assert published.digest == digest
            self.weights.applied.append((self.weights.step, donor, number))
        assert (fate == "skipped") == (is_present and published.kind == "skip")

    @rule()
    def give_up(self) -> None:
        """The donors are waited for no longer in this step."""
        self.is_impatient = True

    @rule()
    def save(self) -> None:
        """A checkpoint; the two newest are kept."""
        self.num_saved += 1
        path = self.root / "checkpoints" / f"step_{self.num_saved}"
        path.mkdir(parents=True)
        state = self.donors.state()
        content = {"run_id": "run", "job": "receiver", **state}
        (path / CHECKPOINT_FILE).write_text(json.dumps(content))
        counts = copy.deepcopy(self.ledger.by_donor)
        saved = Checkpoint(path, copy.deepcopy(self.weights), json.dumps(state), counts)
        self.checkpoints.append(saved)
        for old in self.checkpoints[:-2]:
            shutil.rmtree(old.path)
            self.checkpoints.remove(old)
        self.retention.saved_below(path.parent)

    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        """The receiver is killed, and goes on from a checkpoint, or begins anew without one."""
        if not self.checkpoints:
            if self.will_save:
                self.covered["begun anew"] += 1
                self.weights, self.before = Weights(), (-1, "")
                self.start_receiver()
            return
        saved = data.draw(st.sampled_from(self.checkpoints))
        self.covered["resumed"] += 1
        self.covered["taken back"] += len(self.weights.applied) - len(saved.weights.applied)
        self.weights = copy.deepcopy(saved.weights)
        self.before = (-1, "")
        self.start_receiver()
        self.donors.load_state(json.loads(saved.state))
        self.ledger = Ledger(None)
        self.ledger.by_donor = copy.deepcopy(saved.counts)
        self.begin_step()

    # -- what is true at any time -----------------------------------------------------------------

    @invariant()
    def the_books_add_up(self) -> None:
        for job in self.donors.names:
            pending, published = self.donors.published(job)
            counts = self.ledger.counts(job)
            fates = [fate for (donor, _), fate in self.weights.fates.items() if donor == job]
            assert counts == {fate: fates.count(fate) for fate in counts}
            assert counts.keys() == {"applied", "dropped", "rejected", "skipped"}
            assert sum(counts.values()) + pending == published
            cursor, noted = self.donors.cursors()[job], set(self.transport.rejected(job))
            expected = {
                number
                for number, what in self.published[job].items()
                if what.kind != "end"
                and (what.kind != "lost" or number < cursor or number in noted)
            }  # fmt: skip
            # A gap before a stranger's file, which the donor was not given the time to fill.
            gaps = noted | {number for donor, number in self.weights.fates if donor == job}
            assert published == len(expected | gaps)

    @invariant()
    def nothing_is_deleted_that_a_resume_may_ask_for(self) -> None:
        cursors: list[dict[str, Any]] = [json.loads(c.state)["donors"] for c in self.checkpoints]
        begins_anew = self.will_save and not self.checkpoints
        needed = {} if begins_anew else self.donors.cursors()
        for job in JOBS:
            lowest = min(
                [needed.get(job, 0), *(c[job]["cursor"] if job in c else 0 for c in cursors)]
            )
            there = {*self.transport.sequences(job), *self.transport.rejected(job)}
            for number, what in self.published[job].items():
                assert number < lowest or what.kind == "lost" or number in there
