"""The receiver's reading of a donor's stream, record by real record."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable

import pytest
import torch

from tests.unit.streams import Bridge
from toolkit.bridge.ledger import Entry


def test_that_gradients_are_applied_in_order(bridge: Bridge) -> None:
    for step in range(3):
        sequence = bridge.donate(at=step)
        verdict = bridge.take()

        assert verdict.sequence == sequence == step
        assert verdict.staleness == 0
        assert verdict.digest is not None
        assert verdict.entries == (
            Entry("donor", sequence, "applied", step, digest=verdict.digest),
        )
        fetched = bridge.inbox.fetched
        assert fetched is not None
        assert fetched.header.tensors_digest == verdict.digest
        assert torch.equal(fetched.tensors["w"], torch.full((3,), float(sequence)))
    assert bridge.inbox.cursor == 3


def test_that_an_empty_stream_is_waited_for(bridge: Bridge) -> None:
    bridge.peer.sign_of_life()

    assert bridge.look() is None
    assert bridge.look() is None


def test_that_a_skip_lets_the_step_go_on_without(bridge: Bridge) -> None:
    bridge.donate(at=0, kind="skip")
    verdict = bridge.take()

    assert verdict.digest is None
    assert verdict.entries == (Entry("donor", 0, "skipped", 0),)
    assert bridge.look() is None


def test_that_a_record_is_a_sign_of_life_once(bridge: Bridge) -> None:
    bridge.donate(at=0)
    bridge.now += 9
    bridge.look()
    assert bridge.peer.seen
    assert bridge.peer.silent_seconds == 0
    bridge.now += 9
    bridge.look()
    assert bridge.peer.silent_seconds == 9


def test_that_an_ended_donor_is_not_waited_for(
    bridge: Bridge, caplog: pytest.LogCaptureFixture
) -> None:
    bridge.donate(at=0)
    bridge.donate(at=0, kind="end", weights_digest="")
    bridge.take()
    for _ in range(3):
        verdict = bridge.take()
        assert verdict.digest is None
        assert verdict.entries == (), "an end is no payload and has no fate"

    assert caplog.text.count("the donor has ended") == 1
    assert bridge.inbox.donor_is_away
    assert bridge.inbox.pending() == 0


def test_that_a_donor_that_comes_back_is_followed_again(
    bridge: Bridge, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bridge.donate(at=0, kind="end", weights_digest="")
    bridge.take()
    bridge.donate(at=1)

    assert bridge.take().sequence == 1
    assert "the donor is back at receiver step 1" in caplog.text
    assert bridge.look() is None


def test_that_old_and_foreign_gradients_are_dropped(bridge: Bridge) -> None:
    bridge.donate(at=0)
    bridge.take()
    bridge.donate(at=0)
    bridge.donate(at=1, weights_digest="another attempt's")
    bridge.donate(at=7)  # a future step's
    bridge.donate(at=0, kind="skip")
    bridge.peer.sign_of_life()
    assert bridge.look() is None, "nothing of this answers step 1"
    bridge.donate(at=1)

    verdict = bridge.take()

    assert verdict.sequence == 5
    assert [(entry.fate, entry.reason) for entry in verdict.entries] == [
        ("dropped", "stale"), ("dropped", "superseded"), ("dropped", "superseded"),
        ("dropped", "stale"), ("applied", ""),
    ]  # fmt: skip
    assert {entry.receiver_step for entry in verdict.entries} == {1}


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_how_far_a_step_goes_ahead_of_the_donor(
    make_bridge: Callable[..., Bridge], max_staleness: int
) -> None:
    bridge = make_bridge(max_staleness=max_staleness)
    assert bridge.look() is None, "a donor that was never seen is waited for"
    bridge.donate(at=0, kind="skip")
    for _ in range(max_staleness + 1):  # the newest answered step is 0
        assert bridge.take().digest is None
    assert bridge.look() is None
    bridge.donate(at=bridge.step - max_staleness)

    verdict = bridge.take()

    assert verdict.staleness == max_staleness
    assert verdict.answered == bridge.step - 1 - max_staleness


def test_that_a_gradient_is_used_while_it_is_fresh_enough(
    make_bridge: Callable[..., Bridge],
) -> None:
    bridge = make_bridge(max_staleness=2)
    bridge.donate(at=0)
    assert bridge.take().staleness == 0
    bridge.take()
    bridge.take()
    assert bridge.look() is None, "step 3, answered up to 0"
    bridge.donate(at=0)
    bridge.donate(at=1)
    bridge.donate(at=2)

    verdict = bridge.take()
    assert (verdict.sequence, verdict.staleness) == (2, 2)
    assert verdict.entries[0] == Entry("donor", 1, "dropped", 3, "stale")
    assert bridge.take().staleness == 2
    assert bridge.look() is None, "step 5, answered up to 2"


def test_that_nothing_moves_before_the_step_happened(bridge: Bridge) -> None:
    bridge.damage(bridge.donate(at=0))
    bridge.donate(at=0)
    before = json.dumps(bridge.inbox.state())
    first = bridge.look()

    assert bridge.look() == first, "after a skipped step the same payload comes again"
    assert json.dumps(bridge.inbox.state()) == before
    assert bridge.inbox.cursor == 0
    assert first is not None
    bridge.settle(first)
    assert bridge.inbox.cursor == 2


def test_that_waiting_given_up_lasts_until_the_donor_publishes(bridge: Bridge) -> None:
    alone = bridge.inbox.give_up(bridge.step, bridge.peer)
    assert alone is not None
    bridge.settle(alone)
    assert bridge.take().digest is None
    assert bridge.inbox.donor_is_away
    bridge.donate(at=bridge.step)

    assert bridge.take().digest is not None
    assert not bridge.inbox.donor_is_away
    assert bridge.look() is None


def test_that_the_state_crosses_a_json_file(make_bridge: Callable[..., Bridge]) -> None:
    bridge = make_bridge(max_staleness=2)
    for at in (0, 1):
        bridge.donate(at=at)
        bridge.take()
    bridge.donate(at=1)
    state = json.dumps(bridge.inbox.state())
    expected = bridge.take()

    bridge.step -= 1
    digests = dict(bridge.digests)
    bridge.start()
    bridge.digests.update(digests)
    bridge.inbox.load_state(json.loads(state))

    assert json.dumps(bridge.inbox.state()) == state
    assert bridge.inbox.cursor == 2
    assert bridge.take() == expected, "the digest of older weights must survive"


def test_that_fates_and_pending_add_up_to_what_was_published(
    make_bridge: Callable[..., Bridge],
) -> None:
    bridge = make_bridge(max_staleness=1)
    for at, kind in ((0, "gradient"), (1, "skip"), (1, "gradient"), (0, "gradient")):
        bridge.donate(at=at, kind=kind)  # type: ignore[arg-type]
    bridge.damage(bridge.donate(at=2))
    bridge.donate(at=2)
    for _ in range(4):
        settled = sum(bridge.ledger.counts("donor").values())
        assert settled + bridge.inbox.pending() == bridge.published
        bridge.take()
    assert bridge.fates() == {"applied": 3, "skipped": 1, "dropped": 1, "rejected": 1}

    bridge.donate(at=9)
    bridge.donate(at=9, kind="end")
    assert (
        sum(bridge.ledger.counts("donor").values()) + bridge.inbox.pending() == bridge.published - 1
    )


def test_that_a_settled_payload_is_not_kept_in_memory(bridge: Bridge) -> None:
    bridge.donate(at=0)
    bridge.take()
    assert bridge.inbox.fetched is not None
    tensor = weakref.ref(bridge.inbox.fetched.tensors["w"])
    bridge.donate(at=1)
    bridge.take()

    assert tensor() is None
