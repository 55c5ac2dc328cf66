"""Counts and the trail of fates."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import pytest

from tests.unit.full_disk import is_directory, no_file_above
from toolkit.bridge.errors import BridgeError
from toolkit.bridge.ledger import Entry, Ledger, Resumption, read_path, trail_path
from toolkit.bridge.reasons import Fate

ENTRIES = [
    Entry("donor", 0, "applied", 0),
    Entry("donor", 1, "dropped", 1, "stale"),
    Entry("donor", 2, "applied", 1),
    Entry("donor", 3, "rejected", 2, "digest"),
]
COUNTS = {"applied": 2, "dropped": 1, "rejected": 1, "skipped": 0}


def record(ledger: Ledger, entries: Iterable[Entry]) -> None:
    """Count entries and append them to the trail."""
    ledger.note(entries)
    ledger.flush()


def test_that_every_fate_begins_at_0() -> None:
    assert Ledger(None).counts("donor") == dict.fromkeys(get_args(Fate), 0)


def test_that_fates_are_counted_and_trailed_in_order(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    record(ledger, ENTRIES[:1])
    record(ledger, ())
    record(ledger, iter(ENTRIES[1:]))

    assert ledger.counts("donor") == COUNTS
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines()
    assert [Entry(**json.loads(line)) for line in lines] == ENTRIES


def test_that_the_trail_is_there_as_soon_as_it_is_flushed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    assert not path.exists()
    for number, entry in enumerate(ENTRIES, start=1):
        record(ledger, [entry])
        assert len(path.read_text().splitlines()) == number


def test_that_a_trail_is_never_cut(tmp_path: Path) -> None:
    for _ in range(2):
        record(Ledger(tmp_path / "ledger.jsonl"), ENTRIES[:2])

    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 4


def test_that_ranks_without_a_trail_count_too() -> None:
    ledger = Ledger(None)
    record(ledger, ENTRIES)

    assert ledger.counts("donor") == COUNTS


def test_that_counts_cross_a_json_file() -> None:
    ledger = Ledger(None)
    record(ledger, ENTRIES)
    resumed = Ledger(None)
    resumed.resume(Resumption(1, 3), json.loads(json.dumps(ledger.by_donor)))
    record(resumed, ENTRIES[:1])

    assert resumed.counts("donor") == {**COUNTS, "applied": 3}
    assert ledger.counts("donor") == COUNTS


def test_that_a_durable_trail_is_synced_before_it_counts(tmp_path: Path, synced: list[int]) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, durable=True)
    record(ledger, ENTRIES[:1])
    record(ledger, ())
    record(ledger, ENTRIES[1:])
    record(Ledger(tmp_path / "other.jsonl"), ENTRIES)

    assert synced == [path.stat().st_ino, tmp_path.stat().st_ino, path.stat().st_ino]


class Attempts:
    """A run whose receiver started several times."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        (run_dir / "bridge" / "receiver").mkdir(parents=True)

    def start(self, attempt: int, resumed: Resumption | None = None) -> Ledger:
        ledger = Ledger(trail_path(self.run_dir, attempt))
        if resumed is not None:
            ledger.resume(resumed, {})
            ledger.flush()
            ledger.by_donor = {"donor": dict(COUNTS)}
        return ledger

    def steps(self, attempt: int) -> list[tuple[int, int]]:
        """Sequence and receiver step of what led to an attempt's weights."""
        path = read_path(self.run_dir, attempt)
        return [(entry.sequence, entry.receiver_step) for entry in path]


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    return Attempts(tmp_path)


def applied(*steps: int, offset: int = 0) -> list[Entry]:
    return [Entry("donor", step + offset, "applied", step, digest="d") for step in steps]


def test_that_the_path_of_one_attempt_is_its_trail(attempts: Attempts) -> None:
    record(attempts.start(1), ENTRIES)

    assert read_path(attempts.run_dir, 1) == ENTRIES
    assert read_path(attempts.run_dir, 2) == [], "an attempt without a fate has no trail"


def test_that_only_what_a_checkpoint_holds_is_on_the_path(attempts: Attempts) -> None:
    record(attempts.start(1), applied(0, 1, 2, 3))
    record(attempts.start(2, Resumption(1, 2)), applied(2, 3, 4, offset=10))

    assert attempts.steps(2) == [(0, 0), (1, 1), (12, 2), (13, 3), (14, 4)]
    assert attempts.steps(1) == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_that_a_resume_may_go_back_behind_the_last_attempt(attempts: Attempts) -> None:
    record(attempts.start(1), applied(0, 1, 2, 3))
    record(attempts.start(2, Resumption(1, 2)), applied(2, offset=10))
    record(attempts.start(3, Resumption(1, 3)), applied(3, offset=20))
    record(attempts.start(4, Resumption(2, 3)), applied(3, offset=30))

    assert attempts.steps(3) == [(0, 0), (1, 1), (2, 2), (23, 3)]
    assert attempts.steps(4) == [(0, 0), (1, 1), (12, 2), (33, 3)]


def test_that_an_attempt_that_began_anew_owes_nothing_to_earlier_ones(attempts: Attempts) -> None:
    record(attempts.start(1), applied(0, 1))
    record(attempts.start(2), applied(0, offset=10))

    assert attempts.steps(2) == [(10, 0)]


def test_that_an_attempt_may_go_back_to_its_own_checkpoint(attempts: Attempts) -> None:
    ledger = attempts.start(1)
    record(ledger, applied(0, 1, 2))
    ledger.resume(Resumption(1, 1), ledger.by_donor)
    record(ledger, applied(1, offset=10))

    assert attempts.steps(1) == [(0, 0), (11, 1)]


def test_that_a_line_cut_short_by_a_kill_is_left_out(attempts: Attempts) -> None:
    record(attempts.start(1), applied(0, 1))
    trail = trail_path(attempts.run_dir, 1)
    trail.write_text(trail.read_text()[:-9])

    assert attempts.steps(1) == [(0, 0)]


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "[]",
        '{"sequence": 1}',
        '{"sequence": 1, "fate": "eaten", "receiver_step": 1}',
        '{"sequence": "1", "fate": "applied", "receiver_step": 1}',
        '{"sequence": 1, "fate": "applied", "receiver_step": 1, "more": 1}',
        '{"sequence": 1, "fate": "applied", "receiver_step": 1, "digest": 1}',
        '{"resumed_attempt": 0}',
        '{"resumed_attempt": 0, "receiver_step": 0.5}',
    ],
)
def test_that_a_line_that_was_meddled_with_is_refused(attempts: Attempts, line: str) -> None:
    record(attempts.start(1), applied(0))
    with trail_path(attempts.run_dir, 1).open("a") as file:
        file.write(line + "\n")

    with pytest.raises(BridgeError, match=r"line 2 of .*ledger-0001.jsonl is no line of a ledger"):
        read_path(attempts.run_dir, 1)


def test_that_attempts_cannot_go_on_from_each_other_for_ever(attempts: Attempts) -> None:
    attempts.start(1, Resumption(2, 3))
    attempts.start(2, Resumption(1, 3))

    with pytest.raises(BridgeError, match="goes on from attempt 2, which came after it"):
        read_path(attempts.run_dir, 2)


def test_that_a_trail_that_is_no_text_is_refused(attempts: Attempts) -> None:
    trail_path(attempts.run_dir, 1).write_bytes(b"\xff\xfe\n")
    trail_path(attempts.run_dir, 2).mkdir()

    for attempt in (1, 2):
        with pytest.raises(BridgeError, match=rf"ledger-000{attempt}.jsonl cannot be read: "):
            read_path(attempts.run_dir, attempt)


@pytest.mark.parametrize("durable", [False, True])
def test_that_a_trail_has_whole_lines_once(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "trail"
    ledger = Ledger(path, durable=durable)
    entries = [Entry("donor", number, "applied", number) for number in range(4)]
    record(ledger, entries[:1])
    ledger.note(entries[1:3])
    for _ in range(2):
        with no_file_above(path.stat().st_size + 20), pytest.raises(OSError, match="too large"):
            ledger.flush()
    ledger.note(entries[3:])
    ledger.flush()
    ledger.flush()

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["sequence"] for line in lines] == [0, 1, 2, 3]
    assert ledger.counts("donor")["applied"] == 4


def test_that_a_trail_whose_first_line_failed_is_as_durable_and_as_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    ledger = Ledger(tmp_path / "trail", durable=True)
    ledger.note([Entry("donor", 0, "applied", 0)])
    with no_file_above(0), pytest.raises(OSError, match="too large"):
        ledger.flush()
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(is_directory(descriptor)))
    ledger.flush()

    assert synced == [False, True]
    assert (tmp_path / "trail").stat().st_mode & 0o777 == 0o600
