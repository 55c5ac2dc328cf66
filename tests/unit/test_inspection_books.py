"""Whether what ``gradient-bridge inspect`` finds on the disk adds up, and what it names if not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.run_files import Streams
from toolkit.bridge.ledger import Entry, Ledger, Resumption, trail_path
from toolkit.inspection.command import watch


def test_that_deleted_payloads_count_by_their_numbers(tmp_path: Path) -> None:
    streams = Streams(tmp_path / "0001")
    streams.publish(9)
    streams.transport.acknowledge("donor", 9)
    streams.settle(1, *range(9))

    books = streams.books()

    assert (books["published"], books["applied"], books["pending"]) == (10, 9, 1)
    assert (books["adds_up"], books["problems"]) == (True, [])


def test_that_a_payload_without_a_fate_is_named(tmp_path: Path) -> None:
    streams = Streams(tmp_path / "0001")
    for sequence in (7, 8, 9):
        streams.publish(sequence)
    streams.transport.acknowledge("donor", 7)
    streams.settle(1, 0, 1, 2, 4, 5, 6, 7, 9)  # 3 is gone, 8 is there

    books = streams.books()

    assert (books["published"], books["applied"], books["pending"]) == (10, 8, 0)
    assert books["adds_up"] is False
    assert books["unaccounted"] == [3, 8]
    assert "have no fate, though passed over: 3, 8" in books["problems"][0]


def test_that_numbers_acknowledged_without_a_fate_are_named(tmp_path: Path) -> None:
    streams = Streams(tmp_path / "0001")
    streams.transport.acknowledge("donor", 10**12)
    streams.settle(1, 0, 1)

    books = streams.books()

    assert books["unaccounted"] == [2, 3, 4, 5, 6]
    assert books["adds_up"] is False


def test_that_two_fates_of_one_payload_are_named(tmp_path: Path) -> None:
    streams = Streams(tmp_path / "0001")
    streams.settle(1, 0, 1, 1, 2)

    books = streams.books()

    assert (books["published"], books["applied"], books["repeated"]) == (3, 4, [1])
    assert books["adds_up"] is False
    assert "have more than one fate: 1" in books["problems"][0]


@pytest.mark.parametrize(("starts", "fits"), [(1, False), (2, True), (3, True)])
def test_that_a_gone_number_is_an_end_only_if_a_start_came_after(
    tmp_path: Path, starts: int, fits: bool
) -> None:
    streams = Streams(tmp_path / "0001", starts)
    streams.publish(5)
    streams.transport.acknowledge("donor", 5)
    streams.settle(1, 0, 1, 2, 4)  # 3 was the end of the first start

    books = streams.books()

    assert books["adds_up"] is fits
    assert books["published"] == (5 if fits else 6)


def test_that_an_end_that_is_there_does_not_excuse_a_lost_payload(tmp_path: Path) -> None:
    streams = Streams(tmp_path / "0001", starts=2)
    streams.publish(3, "end")
    streams.publish(5)
    streams.settle(1, 1, 2, 4)
    assert streams.books()["unaccounted"] == [0]

    streams.publish(6, "end")  # the second start has ended too
    books = streams.books()
    assert books["unaccounted"] == [0]
    assert (books["published"], books["pending"]) == (5, 1)


def test_that_the_newest_end_does_not_hide_an_earlier_one(tmp_path: Path) -> None:
    streams = Streams(tmp_path / "0001", starts=2)
    streams.publish(3, "end")
    streams.settle(1, 0, 2)  # 1 was the end of the first start

    books = streams.books()

    assert (books["published"], books["adds_up"]) == (2, True)


def test_that_the_books_of_two_donors_are_kept_apart(tmp_path: Path) -> None:
    streams = Streams(tmp_path / "0001")
    streams.transport.open_stream("east")
    streams.settle(1, 0, 1, 3)
    ledger = Ledger(trail_path(streams.run_dir, 1))
    ledger.note(Entry("east", sequence, "dropped", 0, "stale") for sequence in (0, 1, 2))
    ledger.flush()
    streams.start("receiver", 2)
    streams.settle(2, 3)
    (look,), _ = watch([streams.run_dir], 0.01)
    donor, east = look.report().fates

    assert (donor.donor, donor.applied, donor.dropped, donor.published) == ("donor", 1, 0, 2)
    assert (donor.settled_before, donor.unaccounted) == (2, [2])
    assert (east.donor, east.published, east.settled_before) == ("east", 0, 0)


def test_that_a_resume_counts_only_what_led_to_its_weights(tmp_path: Path) -> None:
    streams = Streams(tmp_path / "0001")
    for sequence in range(7):
        streams.publish(sequence)
    streams.settle(1, 0, 1, 2, 3, 4)
    streams.start("receiver", 2)
    resumed = Ledger(trail_path(streams.run_dir, 2))
    resumed.resume(Resumption(1, 3), {})
    resumed.flush()
    streams.settle(2, 3)

    books = streams.books()

    assert (books["published"], books["applied"], books["pending"]) == (7, 4, 3)
    assert (books["adds_up"], books["settled_before"]) == (True, 0)


def test_that_a_start_from_nothing_is_not_charged_with_what_came_before(tmp_path: Path) -> None:
    streams = Streams(tmp_path / "0001")
    for sequence in (4, 5, 6):
        streams.publish(sequence)
    streams.transport.acknowledge("donor", 5)
    streams.settle(1, *range(5))
    streams.start("receiver", 2)
    streams.settle(2, 4, 5)

    books = streams.books()

    assert (books["published"], books["applied"], books["pending"]) == (3, 2, 1)
    assert (books["adds_up"], books["settled_before"]) == (True, 4)


@pytest.mark.timeout(60)
def test_that_thousands_of_records_and_a_number_far_away_are_no_trouble(tmp_path: Path) -> None:
    streams = Streams(tmp_path / "0001")
    streams.publish(0)
    first = streams.transport.path("donor", 0)
    for sequence in range(1, 2_000):
        os.link(first, streams.transport.path("donor", sequence))
    streams.transport.path("donor", 9_999_999_999).write_bytes(b"none of ours")

    books = streams.books()

    assert (books["published"], books["pending"], books["adds_up"]) == (2_001, 2_001, True)
