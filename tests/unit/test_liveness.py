"""Life is an observed change, on the observer's own clock."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.unit.metadata import SimulatedTime
from toolkit.bridge import liveness
from toolkit.bridge.liveness import Heartbeat, PeerWatch
from toolkit.bridge.transport import DirectoryTransport


def heartbeat_file(transport: DirectoryTransport) -> Path:
    return transport.root / "donor" / "heartbeat"


def test_that_a_value_alone_is_no_life(transport: DirectoryTransport, clock: SimulatedTime) -> None:
    transport.beat("donor", 41)
    peer = PeerWatch(transport, "donor", clock)
    for _ in range(3):
        peer.observe()

    assert not peer.seen
    assert not peer.is_alive(1e9)


def test_that_a_change_is_life(transport: DirectoryTransport, clock: SimulatedTime) -> None:
    transport.beat("donor", 41)
    peer = PeerWatch(transport, "donor", clock)
    clock.sleep(7)
    transport.beat("donor", 42)
    assert peer.silent_seconds == 7

    peer.observe()

    assert peer.seen
    assert peer.silent_seconds == 0
    clock.sleep(5)
    assert peer.is_alive(5.1)
    assert not peer.is_alive(5)


def test_that_a_first_value_is_life(transport: DirectoryTransport, clock: SimulatedTime) -> None:
    peer = PeerWatch(transport, "donor", clock)
    transport.beat("donor", 1)
    peer.observe()

    assert peer.seen


def test_that_a_counter_that_begins_again_is_life(
    transport: DirectoryTransport, clock: SimulatedTime
) -> None:
    transport.beat("donor", 41)
    peer = PeerWatch(transport, "donor", clock)
    transport.beat("donor", 1)
    peer.observe()

    assert peer.seen


@pytest.mark.parametrize("offset", [-3600, 3600, 10 * 365 * 86400])
def test_that_the_clock_of_the_other_host_says_nothing(
    transport: DirectoryTransport, clock: SimulatedTime, offset: int
) -> None:
    transport.beat("donor", 41)
    peer = PeerWatch(transport, "donor", clock)
    status = heartbeat_file(transport).stat()
    os.utime(heartbeat_file(transport), (status.st_atime + offset, status.st_mtime + offset))
    clock.sleep(3)
    peer.observe()

    assert not peer.seen
    assert peer.silent_seconds == 3


def test_that_a_heartbeat_that_cannot_be_read_is_no_life(
    transport: DirectoryTransport, clock: SimulatedTime
) -> None:
    # an unreadable or vanished file reads as "", which differs from the last counter; the
    # way back differs again. A dead job on a flapping disk would live for ever.
    transport.beat("donor", 41)
    peer = PeerWatch(transport, "donor", clock)
    heartbeat_file(transport).rename(heartbeat_file(transport).with_name("away"))
    peer.observe()
    heartbeat_file(transport).with_name("away").rename(heartbeat_file(transport))
    peer.observe()

    assert not peer.seen


def test_that_awaiting_life_ends(transport: DirectoryTransport, clock: SimulatedTime) -> None:
    transport.beat("donor", 41)
    start = clock()

    assert not PeerWatch(transport, "donor", clock).await_life(5)
    assert 5 <= clock() - start < 6


def test_that_a_job_beats_in_a_thread_until_it_stops(
    transport: DirectoryTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.01)
    transport.beat("donor", 41)
    heart = Heartbeat(transport, "donor")
    assert PeerWatch(transport, "donor").await_life(60)
    assert PeerWatch(transport, "donor").await_life(60)

    heart.stop()

    assert not [thread for thread in threading.enumerate() if thread.name == "donor-heartbeat"]
    assert int(transport.heartbeat("donor")) > 42, "a restarted job must not repeat a value"


def test_that_a_failing_disk_does_not_end_the_heartbeat(
    transport: DirectoryTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.01)
    heart = Heartbeat(transport, "donor")
    away = transport.root / "away"
    (transport.root / "donor").rename(away)
    assert not PeerWatch(transport, "donor").await_life(0.2)
    away.rename(transport.root / "donor")

    assert PeerWatch(transport, "donor").await_life(60)
    heart.stop()
