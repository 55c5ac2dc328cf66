"""Every wait for a peer ends, and says why."""

from __future__ import annotations

import itertools
import logging

import pytest

from tests.unit.metadata import SimulatedTime
from toolkit.bridge import liveness
from toolkit.bridge.errors import PeerError
from toolkit.bridge.liveness import (
    BEAT_SECONDS,
    BLIND_SECONDS,
    STALL_FACTOR,
    STATUS_SECONDS,
    PeerWatch,
    Wait,
)
from toolkit.bridge.polling import pause
from toolkit.bridge.transport import DirectoryTransport

HINT = "Start it now"


def look_for(wait: Wait, clock: SimulatedTime, seconds: float) -> None:
    """Look once a second, and not at the very end; the wait must go on."""
    end = clock() + seconds
    while clock() < end - 1:
        clock.sleep(1)
        assert wait.gave_up() is None
    clock.sleep(end - clock())


def wait_for(peer: PeerWatch, peer_wait: float = 10.0, require_peer: bool = False) -> Wait:
    return Wait(peer, "its gradient", peer_wait, require_peer, HINT)


def test_that_a_wait_for_nobody_ends(transport: DirectoryTransport, clock: SimulatedTime) -> None:
    wait = wait_for(PeerWatch(transport, "donor", clock))
    look_for(wait, clock, 9.99)
    assert wait.gave_up() is None
    clock.sleep(0.011)

    assert wait.gave_up() == "the donor did not come for 10 s"


def test_that_silence_counts_from_the_last_sign_of_life(
    transport: DirectoryTransport, clock: SimulatedTime
) -> None:
    peer = PeerWatch(transport, "donor", clock)
    wait = wait_for(peer)
    look_for(wait, clock, 8)
    transport.beat("donor", 1)
    assert wait.gave_up() is None
    look_for(wait, clock, 9.9)
    assert wait.gave_up() is None
    clock.sleep(0.2)

    assert wait.gave_up() == "the donor fell silent for 10 s"


def test_that_every_wait_is_given_its_whole_time(
    transport: DirectoryTransport, clock: SimulatedTime
) -> None:
    peer = PeerWatch(transport, "donor", clock)
    peer.sign_of_life()
    clock.sleep(3600)  # a long step of this job, in which it did not look
    wait = wait_for(peer)
    assert wait.gave_up() is None
    clock.sleep(9)
    assert wait.gave_up() is None


@pytest.mark.parametrize(("longest_round", "limit"), [(0.0, 100.0), (5.0, 100.0), (50.0, 500.0)])
def test_that_a_beating_peer_is_waited_for_up_to_the_stall_limit(
    transport: DirectoryTransport, clock: SimulatedTime, longest_round: float, limit: float
) -> None:
    assert limit == STALL_FACTOR * max(10.0, longest_round)
    peer = PeerWatch(transport, "donor", clock)
    peer.longest_round = longest_round
    wait = wait_for(peer)
    for beat in range(1, int(limit)):
        clock.sleep(1)
        transport.beat("donor", beat)
        assert wait.gave_up() is None, f"given up after {beat} s"
    clock.sleep(1)
    transport.beat("donor", 0)

    assert wait.gave_up() == f"the donor lives but brought nothing for {limit:.0f} s"


def test_that_a_required_peer_is_an_error(
    transport: DirectoryTransport, clock: SimulatedTime
) -> None:
    wait = wait_for(PeerWatch(transport, "donor", clock), require_peer=True)
    assert wait.gave_up() is None
    look_for(wait, clock, 10)

    with pytest.raises(PeerError, match=r"for 10 s, and --require_peer is set: .*its gradient"):
        wait.gave_up()


def test_that_a_required_peer_that_stalls_is_an_error(
    transport: DirectoryTransport, clock: SimulatedTime
) -> None:
    peer = PeerWatch(transport, "donor", clock)
    wait = wait_for(peer, require_peer=True)
    for beat in range(1, 10 * STALL_FACTOR):
        clock.sleep(1)
        transport.beat("donor", beat)
        wait.gave_up()
    clock.sleep(1)
    transport.beat("donor", 0)

    with pytest.raises(PeerError, match="brought nothing"):
        wait.gave_up()


def test_that_a_missing_peer_is_named_soon_and_again(
    transport: DirectoryTransport, clock: SimulatedTime, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, liveness.__name__)
    wait = wait_for(PeerWatch(transport, "donor", clock))
    wait.gave_up()
    assert not caplog.messages, "its heart may not have had the time to beat"
    clock.sleep(2 * BEAT_SECONDS)
    wait.gave_up()
    wait.gave_up()
    assert caplog.messages == [
        f"waiting for its gradient since 2 s: no donor yet, at most 10 s. {HINT}"
    ]
    look_for(wait, clock, STATUS_SECONDS)
    assert len(caplog.messages) == 1
    wait.gave_up()

    assert len(caplog.messages) == 2


def test_that_a_seen_peer_is_named_only_in_a_long_wait(
    transport: DirectoryTransport, clock: SimulatedTime, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, liveness.__name__)
    peer = PeerWatch(transport, "donor", clock)
    peer.sign_of_life()
    wait = wait_for(peer)
    wait.gave_up()
    look_for(wait, clock, STATUS_SECONDS - 0.1)
    wait.gave_up()
    assert not caplog.messages
    clock.sleep(0.1)
    wait.gave_up()

    assert len(caplog.messages) == 1
    assert "the donor is silent, for 5 of 10 s" in caplog.messages[0]
    assert HINT not in caplog.messages[0]


def test_that_pauses_grow_with_the_wait_within_bounds(clock: SimulatedTime) -> None:
    start = clock()
    pauses = []
    while clock() < start + 60:
        before = clock()
        pause(before - start)
        pauses.append(clock() - before)

    assert pauses[0] == pytest.approx(0.0005)
    assert pauses[-1] == pytest.approx(0.5)
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(pauses))


def test_that_less_patience_with_silence_is_no_less_with_a_slow_peer(
    transport: DirectoryTransport, clock: SimulatedTime
) -> None:
    peer = PeerWatch(transport, "donor", clock)
    peer.sign_of_life()
    wait = Wait(peer, "its gradient", 10.0, False, HINT, patience=5.0)
    for beat in range(1, 10 * STALL_FACTOR):
        clock.sleep(1)
        transport.beat("donor", beat)
        assert wait.gave_up() is None, f"given up after {beat} s"
    silent = Wait(peer, "its gradient", 10.0, False, HINT, patience=5.0)
    look_for(silent, clock, 5)
    assert silent.gave_up() == "the donor fell silent for 5 s"


@pytest.mark.parametrize("beats", [True, False])
def test_that_a_time_in_which_this_job_did_not_look_is_no_silence(
    transport: DirectoryTransport, clock: SimulatedTime, beats: bool
) -> None:
    # a scheduler that suspends both jobs, or a disk that fails for both: the first to look
    # again finds an old counter, and gives up a job that is back within a beat.
    transport.beat("donor", 1)
    peer = PeerWatch(transport, "donor", clock)
    peer.sign_of_life()
    wait = wait_for(peer)
    look_for(wait, clock, 4)
    for _ in range(2):
        clock.sleep(3600)
        assert wait.gave_up() is None
    assert wait.seconds <= 4 + 2 * BLIND_SECONDS
    if beats:
        transport.beat("donor", 2)
        look_for(wait, clock, 9)
        assert wait.gave_up() is None
    else:  # each of many slow looks counts for something, so that the wait ends all the same
        for _ in range(10):
            clock.sleep(3600)
            reason = wait.gave_up()
        assert reason == "the donor fell silent for 10 s"
