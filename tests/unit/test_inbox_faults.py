"""Rejected, missing and late records in a donor's stream."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.streams import Bridge
from toolkit.bridge.errors import PayloadError
from toolkit.bridge.inbox import MISSING_LOOKS, MISSING_SECONDS


def test_that_a_rejected_payload_is_noted_and_waited_for_again(bridge: Bridge) -> None:
    bridge.damage(bridge.donate(at=0))

    assert bridge.look() is None
    assert bridge.transport.rejection("donor", 0) == "truncated"
    assert bridge.look() is None, "the same rejection must not count twice"
    bridge.donate(at=0)
    verdict = bridge.take()

    assert verdict.sequence == 1
    assert bridge.fates() == {"rejected": 1, "applied": 1}
    assert verdict.entries[0].reason == "truncated"


def test_that_no_number_of_rejections_is_an_answer(bridge: Bridge) -> None:
    for _ in range(3):
        bridge.damage(bridge.donate(at=0))
        assert bridge.look() is None
    bridge.donate(at=0, kind="skip")  # so a donor says that it has no other payload

    verdict = bridge.take()

    assert verdict.digest is None
    assert bridge.fates() == {"rejected": 3, "skipped": 1}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run_id": "other"}, "alien"),
        ({"job": "receiver"}, "alien"),
        ({"sequence": 9}, "alien"),
        ({"kind": "weights"}, "alien"),
        ({"tensors": {"w": torch.zeros(4)}}, "schema"),
        ({"tensors": {"v": torch.zeros(3)}}, "schema"),
        ({"tensors": {"w": torch.tensor([0.0, torch.nan, 0.0])}}, "nonfinite"),
        ({"tensors": {"w": torch.zeros(10_000)}}, "too_large"),
        ({"count": 0.0}, "count"),
        ({"unit": "tokens"}, "unit"),
    ],
)
def test_what_is_rejected(bridge: Bridge, changes: dict[str, Any], reason: str) -> None:
    bridge.donate(at=0, **changes)

    assert bridge.look() is None
    assert bridge.transport.rejection("donor", 0) == reason


@pytest.mark.parametrize("make_alien", [os.mkfifo, os.mkdir])
def test_that_something_else_in_a_records_place_is_rejected(
    bridge: Bridge, make_alien: Callable[[Path], None]
) -> None:
    make_alien(bridge.transport.path("donor", 0))

    assert bridge.look() is None
    assert bridge.transport.rejection("donor", 0) == "not_a_file"


def test_that_another_rank_can_refuse_what_this_one_read(bridge: Bridge) -> None:
    bridge.donate(at=0)
    verdict = bridge.look()
    assert verdict is not None
    bridge.inbox.reject(verdict.sequence, PayloadError("unreadable", "on another rank"))

    assert bridge.look() is None
    assert bridge.transport.rejection("donor", 0) == "unreadable"


def lose(bridge: Bridge, at: int) -> int:
    sequence = bridge.donate(at=at)
    bridge.transport.path("donor", sequence).unlink()
    return sequence


def test_that_a_number_is_lost_only_after_a_later_one_is_there(bridge: Bridge) -> None:
    lose(bridge, at=0)
    for _ in range(3 * MISSING_LOOKS):
        bridge.now += MISSING_SECONDS
        assert bridge.look() is None
    assert bridge.transport.rejection("donor", 0) is None
    bridge.donate(at=0)
    for _ in range(MISSING_LOOKS - 1):
        bridge.now += MISSING_SECONDS
        assert bridge.look() is None
        assert bridge.look() is None, "a look at once is no other look"
    bridge.now += MISSING_SECONDS

    assert bridge.take().sequence == 1
    assert bridge.transport.rejection("donor", 0) == "missing"
    assert bridge.fates() == {"rejected": 1, "applied": 1}


def test_that_a_number_is_not_lost_because_of_an_alien_file(bridge: Bridge) -> None:
    # a slow donor was passed over at every number before a stranger's file with a later one
    bridge.transport.path("donor", 9).write_bytes(b"no payload")
    for _ in range(3 * MISSING_LOOKS):
        bridge.now += MISSING_SECONDS
        assert bridge.look() is None
    bridge.donate(at=0)

    assert bridge.take().sequence == 0
    assert bridge.fates() == {"applied": 1}


def test_that_an_alien_file_is_no_news_of_a_donor_that_is_away(bridge: Bridge) -> None:
    # with its high number it was news for ever, so that no teacher stood in for the donor
    bridge.donate(at=0, kind="end", weights_digest="")
    bridge.take()
    bridge.transport.path("donor", 5000).write_bytes(b"alien")
    assert not bridge.inbox.has_news()

    bridge.donate(at=1)

    assert bridge.inbox.has_news()


def test_that_a_donor_comes_back_below_the_number_of_an_alien_file(bridge: Bridge) -> None:
    # all of its payloads counted as published before this start of the receiver: one that had
    # been given up was never waited for again.
    bridge.transport.path("donor", 9).write_bytes(b"no payload")
    bridge.start()
    assert bridge.inbox.give_up(bridge.step, bridge.peer) is not None
    bridge.donate(at=0)
    bridge.take()

    assert not bridge.inbox.donor_is_away
    assert bridge.peer.seen


def test_that_a_number_that_comes_late_is_read(bridge: Bridge) -> None:
    bridge.donate(at=0)
    late = bridge.transport.path("donor", 0).rename(bridge.transport.root / "late")
    bridge.donate(at=0)
    for _ in range(MISSING_LOOKS - 1):
        bridge.now += MISSING_SECONDS
        assert bridge.look() is None
    late.rename(bridge.transport.path("donor", 0))
    bridge.now += MISSING_SECONDS

    assert bridge.take().sequence == 0


def test_that_every_missing_number_is_looked_for_as_often(bridge: Bridge) -> None:
    # the looks are counted on from the last missing number, also from one that came late
    # after all: the next one that a network disk shows late is lost at its first look.
    lose(bridge, at=0)
    bridge.donate(at=0)
    for _ in range(MISSING_LOOKS):
        bridge.now += MISSING_SECONDS
        verdict = bridge.look()
    assert verdict is not None
    bridge.settle(verdict)
    bridge.donate(at=1)
    late = bridge.transport.path("donor", 2).rename(bridge.transport.root / "late")
    bridge.donate(at=1)
    bridge.now += MISSING_SECONDS
    assert bridge.look() is None
    late.rename(bridge.transport.path("donor", 2))

    assert bridge.take().sequence == 2


@pytest.mark.parametrize("fault", ["stale", "damaged"])
def test_that_a_record_may_come_at_the_moment_of_giving_up(bridge: Bridge, fault: str) -> None:
    # a new record that is not applied (dropped, rejected) marks the donor as back, the look
    # inside give_up() says "wait", and an AssertionError ends the receiver.
    bridge.donate(at=0)
    bridge.take()
    assert bridge.look() is None
    sequence = bridge.donate(at=0 if fault == "stale" else 1)
    if fault == "damaged":
        bridge.damage(sequence)

    verdict = bridge.inbox.give_up(bridge.step, bridge.peer)

    assert verdict is None or verdict.digest is None


def test_that_a_resume_reads_rejected_payloads_from_their_notes(bridge: Bridge) -> None:
    state = json.dumps(bridge.inbox.state())
    bridge.damage(bridge.donate(at=0))
    bridge.donate(at=0)
    expected = bridge.take()

    bridge.step -= 1
    bridge.start()
    bridge.inbox.load_state(json.loads(state))

    assert bridge.take() == expected


def test_that_a_rejected_payload_is_pending_until_its_step_happened(bridge: Bridge) -> None:
    # a rejected file is moved aside at once, its fate is final only at settle(); in between,
    # and for ever if the run ends there, pending() misses it.
    bridge.damage(bridge.donate(at=0))
    assert bridge.look() is None

    assert bridge.inbox.pending() == bridge.published == 1


def test_that_a_new_receiver_counts_what_an_earlier_start_refused(bridge: Bridge) -> None:
    # the refused record lies aside, so that the listing begins with the one in its place
    bridge.damage(bridge.donate(at=0))
    assert bridge.look() is None
    bridge.donate(at=0)

    bridge.start()

    bridge.take()
    assert bridge.fates() == {"rejected": 1, "applied": 1}


def test_that_a_new_receiver_does_not_look_for_what_was_pruned(bridge: Bridge) -> None:
    # a receiver that starts again in its run without a checkpoint begins at number 0. All
    # that was acknowledged and pruned counts as rejected, two numbers and two seconds a step, and
    # "rejected twice" lets every one of these steps go on without the donor, in lockstep too.
    for step in range(20):
        bridge.donate(at=step)
        bridge.take()
    bridge.transport.acknowledge("donor", bridge.inbox.cursor)
    bridge.transport.prune("donor", bridge.inbox.cursor)
    bridge.step = 0
    bridge.start()
    bridge.donate(at=0)
    while (verdict := bridge.look()) is None:
        bridge.now += MISSING_SECONDS

    assert verdict.digest is not None
    assert "rejected" not in {entry.fate for entry in verdict.entries}
