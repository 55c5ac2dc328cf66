"""Any order of what writers, readers, strangers and kills do to streams, against a plain model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.faults.killed import LINK, NUM_CHANGES, Killed, killed_after
from tests.unit.keys import SIGNER
from toolkit.bridge.authentication import UNSIGNED
from toolkit.bridge.errors import BridgeError, PayloadError
from toolkit.bridge.payload import Header, parse_record
from toolkit.bridge.publisher import Publisher
from toolkit.bridge.reasons import Rejection
from toolkit.bridge.transport import DirectoryTransport

JOBS = ("donor", "east")
NUM_READERS = 2
LIMIT = 10_000
NEAR_NAMES = (
    "7.safetensors", "00000000007.safetensors", "0000000007.safetensors~", "0000000007.SAFETENSORS",
    "0000000007", "\u0660" * 10 + ".safetensors", " 0000000007.safetensors",
    "0000000007.safetensors\n",
)  # fmt: skip
ALIENS: dict[str, Callable[[Path], object]] = {
    "junk": lambda path: path.write_bytes(b"junk"),
    "directory": lambda path: (path / "below").mkdir(parents=True),
    "link": lambda path: path.symlink_to(path.parent.parent),
    "fifo": os.mkfifo,
}
jobs = st.sampled_from(JOBS)
readers = st.integers(0, NUM_READERS - 1)
numbers = st.integers(0, 12)
reasons: st.SearchStrategy[Rejection] = st.sampled_from(("digest", "schema"))
# Mostly nobody dies.
deaths = st.one_of(st.none(), st.none(), st.integers(0, NUM_CHANGES))


@dataclasses.dataclass
class Stream:
    """What must be true of one stream.

    Attributes:
        published: the bytes of every record that was ever there, by number.
        there: the numbers of those that are there now.
        aliens: kind of what else stands in a record's place, by number.
        near: other names in the records' directory.
        aside: whether what was put aside under a number is a directory.
        notes: the reason, by number.
        kept: numbers kept for good.
        acknowledged: as written last.
        beat: as written last.
        old: earlier contents of the small files, by name.
        newest: the writer's newest record that it knows of.
        first: the number after which its next one comes.
    """

    published: dict[int, bytes] = dataclasses.field(default_factory=dict)
    there: set[int] = dataclasses.field(default_factory=set)
    aliens: dict[int, str] = dataclasses.field(default_factory=dict)
    near: set[str] = dataclasses.field(default_factory=set)
    aside: dict[int, bool] = dataclasses.field(default_factory=dict)
    notes: dict[int, str] = dataclasses.field(default_factory=dict)
    kept: set[int] = dataclasses.field(default_factory=set)
    acknowledged: int = 0
    beat: int = 0
    old: dict[str, list[tuple[int, bytes]]] = dataclasses.field(default_factory=dict)
    newest: int = -1
    first: int = 0

    @property
    def names(self) -> set[int]:
        """The numbers that some name in the records' directory has."""
        return self.there | set(self.aliens)

    def restart(self) -> None:
        """The writer knows only what lies on the disk."""
        self.newest = max(self.there, default=-1)
        self.first = max([self.newest, *self.notes]) + 1

    def pick(self, index: int) -> int:
        """Some number that has a name here, or the next."""
        known = sorted({*self.names, self.next()})
        return known[index % len(known)]

    def next(self) -> int:
        """The number that the writer's next record gets."""
        number = self.first
        while number in self.names or number in self.notes:
            number += 1
        return number


class TransportMachine(RuleBasedStateMachine):
    """Two jobs publish, two readers read both; a stranger and kills come between."""

    directory: Path
    covered: Counter[str]  # what has happened, in all examples

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=self.directory))
        self.streams = {job: Stream() for job in JOBS}
        self.value = 0.0

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @initialize(has_key=st.booleans())
    def start(self, has_key: bool) -> None:
        self.signer = SIGNER if has_key else UNSIGNED
        self.readers = [DirectoryTransport(self.root, self.signer) for _ in range(NUM_READERS)]
        # The highest counter that each reader, and each writer, has seen of each small file.
        self.seen: dict[tuple[int | str, str], int] = {}
        self.writers: dict[str, Publisher] = {}
        self.transports: dict[str, DirectoryTransport] = {}
        for job in JOBS:
            self.restart_writer(job)

    # -- writers ----------------------------------------------------------------------------------

    @rule(job=jobs)
    def restart_writer(self, job: str) -> None:
        """It knows nothing but what lies on the disk."""
        self.transports[job] = DirectoryTransport(self.root, self.signer)
        self.writers[job] = Publisher(self.transports[job], job, "run", LIMIT)
        self.streams[job].restart()
        self.forget(job)
        left = [n for n in os.listdir(self.root / job / "records") if n.startswith(".tmp")]
        assert left == [], "half-written files of a killed writer fill the disk"

    @rule(job=jobs, count=st.integers(1, 4))
    def publish(self, job: str, count: int) -> None:
        for _ in range(count):
            stream, number = self.streams[job], self.streams[job].next()
            self.publish_next(job)
            assert self.writers[job].next_sequence == number + 1
            self.note_published(job, number)
            record = parse_record(stream.published[number], self.signer)
            assert record.header.count == self.value
            assert torch.equal(record.tensors["w"], torch.full((3,), self.value))

    def publish_next(self, job: str) -> None:
        self.value += 1
        header = Header(
            kind="gradient", run_id="run", job=job, attempt=1, receiver_step=0, weights_digest="",
            head="h", count=self.value,
        )  # fmt: skip
        self.writers[job].publish(header, {"w": torch.full((3,), self.value)})

    @rule(job=jobs, after=st.integers(0, NUM_CHANGES))
    def die_while_publishing(self, job: str, after: int) -> None:
        """The record appears at the link, or never; the writer starts again."""
        stream, number = self.streams[job], self.streams[job].next()
        path = self.readers[0].path(job, number)
        try:
            with killed_after(after):
                self.publish_next(job)
        except Killed:
            self.covered["killed"] += 1
        if not stream.aliens.keys() & set(range(stream.first, number)):  # they cost changes too
            assert path.exists() == (after > LINK)
        if path.exists():
            self.note_published(job, number)
        self.restart_writer(job)

    def note_published(self, job: str, number: int) -> None:
        stream = self.streams[job]
        assert number not in stream.published, f"{number} of {job} had another content before"
        stream.published[number] = self.readers[0].path(job, number).read_bytes()
        stream.there.add(number)
        stream.newest, stream.first = number, number + 1

    @rule(job=jobs, data=st.data(), same=st.booleans())
    def publish_again(self, job: str, data: st.DataObject, same: bool) -> None:
        """A number that is taken, with the same bytes or others: nothing changes."""
        stream = self.streams[job]
        if not stream.names:
            return
        number = data.draw(st.sampled_from(sorted(stream.names)))
        content = stream.published.get(number, b"") if same else b"other bytes"
        try:
            self.transports[job].publish(job, number, lambda path: path.write_bytes(content))
        except FileExistsError:
            self.covered["refused again"] += 1
            return
        raise AssertionError(f"number {number} of {job} was published twice")

    @rule(job=jobs, after=deaths)
    def prune(self, job: str, after: int | None) -> None:
        """As a donor does before it publishes: below what it reads to be acknowledged."""
        stream, below = self.streams[job], self.transports[job].acknowledged(job)
        assert below == self.expected(job, "acknowledged", job)
        below = min(below, stream.newest)
        may_go = {n for n in stream.names if n < below and n != max(stream.names)}
        may_go -= {n for n, kind in stream.aliens.items() if kind == "directory"}
        if after is None:
            self.writers[job].prune(self.transports[job].acknowledged(job))
            assert all(not os.path.lexists(self.readers[0].path(job, n)) for n in may_go)
        else:
            with contextlib.suppress(Killed), killed_after(after):
                self.writers[job].prune(self.transports[job].acknowledged(job))
        for number in may_go:
            if not os.path.lexists(self.readers[0].path(job, number)):
                self.covered["pruned"] += 1
                stream.there.discard(number)
                stream.aliens.pop(number, None)
        if after is not None:
            self.restart_writer(job)

    @rule(job=jobs)
    def beat(self, job: str) -> None:
        stream = self.streams[job]
        stream.beat += 1
        self.transports[job].beat(job, stream.beat)
        self.remember(job, "heartbeat", stream.beat)
        for reader in range(NUM_READERS):
            self.look_at_counters(reader, job)

    # -- readers ----------------------------------------------------------------------------------

    @rule(reader=readers)
    def restart_reader(self, reader: int) -> None:
        self.readers[reader] = DirectoryTransport(self.root, self.signer)
        self.forget(reader)

    def forget(self, who: int | str) -> None:
        self.seen = {key: value for key, value in self.seen.items() if key[0] != who}

    @rule(reader=readers, job=jobs, number=numbers)
    def read(self, reader: int, job: str, number: int) -> None:
        stream = self.streams[job]
        number = stream.pick(number)
        try:
            data = self.readers[reader].read(job, number, max_bytes=LIMIT)
        except FileNotFoundError:
            assert number not in stream.names
        except PayloadError:
            assert stream.aliens[number] != "junk"
        else:
            expected = stream.published[number] if number in stream.there else b"junk"
            assert data == expected

    @rule(reader=readers, job=jobs, number=numbers)
    def acknowledge(self, reader: int, job: str, number: int) -> None:
        stream = self.streams[job]
        stream.acknowledged = min(number, max(stream.published, default=-1) + 1)
        self.readers[reader].acknowledge(job, stream.acknowledged)
        self.remember(job, "acknowledged", stream.acknowledged)

    @rule(reader=readers, job=jobs, number=numbers, reason=reasons, after=deaths)
    def reject(
        self, reader: int, job: str, number: int, reason: Rejection, after: int | None
    ) -> None:
        stream = self.streams[job]
        number = stream.pick(number)
        if after is None:
            self.readers[reader].reject(job, number, reason, "")
        else:
            try:
                with killed_after(after):
                    self.readers[reader].reject(job, number, reason, "")
            except Killed:
                self.restart_reader(reader)
                note = self.readers[reader].rejection(job, number)
                assert note == stream.notes.get(number) or note == reason
                # The note comes first, so that a dead reader leaves no number without a fate.
                path = self.readers[reader].path(job, number)
                assert note or (number in stream.names) == os.path.lexists(path)
            self.readers[reader].reject(job, number, reason, "")
        stream.notes.setdefault(number, reason)
        if number in stream.names:
            is_directory = stream.aliens.get(number) == "directory"
            # A directory never takes the place of anything, nor anything its place.
            if number in stream.aside and (is_directory or stream.aside[number]):
                return
            self.covered["put aside"] += 1
            stream.aside[number] = is_directory
            stream.there.discard(number)
            stream.aliens.pop(number, None)

    @rule(reader=readers, job=jobs, number=numbers)
    def keep(self, reader: int, job: str, number: int) -> None:
        stream = self.streams[job]
        number = stream.pick(number)
        if number in stream.aliens:
            return
        try:
            self.readers[reader].keep(job, number)
        except BridgeError:
            assert number not in stream.there
        else:
            assert number in stream.there or number in stream.kept
            self.covered["kept"] += 1
            stream.kept.add(number)

    @rule(reader=readers, job=jobs)
    def look_at_counters(self, reader: int, job: str) -> None:
        expected = self.expected(reader, "heartbeat", job)
        assert self.readers[reader].heartbeat(job) == (str(expected) if expected else "")
        assert self.readers[reader].acknowledged(job) == self.expected(reader, "acknowledged", job)

    def expected(self, who: int | str, name: str, job: str) -> int:
        """What one reader must find in a small file: with a key, nothing below what it has seen."""
        stream, key = self.streams[job], (who, f"{job}/{name}")
        value = stream.acknowledged if name == "acknowledged" else stream.beat
        if not self.signer.has_key:
            return value
        if value < self.seen.get(key, 0):
            self.covered["replay refused"] += 1
            return 0
        self.seen[key] = value
        return value

    # -- a stranger --------------------------------------------------------------------------------

    def remember(self, job: str, name: str, value: int) -> None:
        data = (self.root / job / name).read_bytes()
        self.streams[job].old.setdefault(name, []).append((value, data))

    @rule(job=jobs, name=st.sampled_from(["acknowledged", "heartbeat"]), data=st.data())
    @precondition(lambda self: self.signer.has_key)
    def replay(self, job: str, name: str, data: st.DataObject) -> None:
        """Put back what a small file held before. With a key: without one all is believed."""
        stream = self.streams[job]
        if name not in stream.old:
            return
        value, content = data.draw(st.sampled_from(stream.old[name]))
        (self.root / job / name).write_bytes(content)
        if name == "acknowledged":
            stream.acknowledged = value
        else:
            stream.beat = value
        for reader in range(NUM_READERS):
            self.look_at_counters(reader, job)

    @rule(job=jobs, name=st.sampled_from(NEAR_NAMES), kind=st.sampled_from(sorted(ALIENS)))
    def put_near_name(self, job: str, name: str, kind: str) -> None:
        stream = self.streams[job]
        if name not in stream.near:
            ALIENS[kind](self.root / job / "records" / name)
            stream.near.add(name)

    @rule(job=jobs, kind=st.sampled_from(sorted(ALIENS)), ahead=st.sampled_from([0, 0, 1, 3, 5000]))
    def put_in_place(self, job: str, kind: str, ahead: int) -> None:
        """Something in the place of a record that is still to come."""
        stream = self.streams[job]
        number = stream.next() + ahead
        if number not in stream.names:
            ALIENS[kind](self.readers[0].path(job, number))
            stream.aliens[number] = kind

    # -- what is true at any time ------------------------------------------------------------------

    @invariant()
    def the_disk_is_as_the_model_says(self) -> None:
        for number, job in enumerate(JOBS):
            stream, reader = self.streams[job], self.readers[number]
            assert reader.sequences(job) == sorted(stream.names)
            assert reader.alien_names(job) == sorted(stream.near)
            assert reader.rejected(job) == sorted(stream.notes)
            for there in stream.there:
                assert reader.path(job, there).read_bytes() == stream.published[there]
            for kept in stream.kept:
                assert reader.kept_path(job, kept).read_bytes() == stream.published[kept]
            for refused, reason in stream.notes.items():
                assert reader.rejection(job, refused) == reason
