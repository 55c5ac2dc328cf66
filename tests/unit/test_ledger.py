"""Counts and the trail of fates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

from toolkit.bridge.ledger import Entry, Fate, Ledger

ENTRIES = [
    Entry(0, "applied", 0),
    Entry(1, "dropped", 1, "stale"),
    Entry(2, "applied", 1),
    Entry(3, "rejected", 2, "digest"),
]
COUNTS = {"applied": 2, "dropped": 1, "rejected": 1, "skipped": 0}


def test_that_every_fate_begins_at_0() -> None:
    assert Ledger(None).counts == dict.fromkeys(get_args(Fate), 0)


def test_that_fates_are_counted_and_trailed_in_order(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(ENTRIES[:1])
    ledger.record(())
    ledger.record(iter(ENTRIES[1:]))

    assert ledger.counts == COUNTS
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines()
    assert [Entry(**json.loads(line)) for line in lines] == ENTRIES


def test_that_the_trail_is_there_as_soon_as_it_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    assert not path.exists()
    for number, entry in enumerate(ENTRIES, start=1):
        ledger.record([entry])
        assert len(path.read_text().splitlines()) == number


def test_that_a_trail_is_never_cut(tmp_path: Path) -> None:
    for _ in range(2):
        Ledger(tmp_path / "ledger.jsonl").record(ENTRIES[:2])

    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 4


def test_that_ranks_without_a_trail_count_too() -> None:
    ledger = Ledger(None)
    ledger.record(ENTRIES)

    assert ledger.counts == COUNTS


def test_that_counts_cross_a_json_file() -> None:
    ledger = Ledger(None)
    ledger.record(ENTRIES)
    resumed = Ledger(None)
    resumed.counts = json.loads(json.dumps(ledger.counts))
    resumed.record(ENTRIES[:1])

    assert resumed.counts == {**COUNTS, "applied": 3}
