"""The hearts of jobs that wait: slower at rest, and silent for no failing disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.jobs import ReceiverAlone
from tests.unit.metadata import MetadataCounter, SimulatedTime
from tests.unit.waiting import PEER_WAIT, Waiting, make
from toolkit.bridge import liveness, outage, teachers
from toolkit.bridge.liveness import RESTING_BEATS, Heartbeat
from toolkit.bridge.transport import DirectoryTransport

pytestmark = pytest.mark.usefixtures("fresh_state")


def test_what_a_heartbeat_costs(
    tmp_path: Path, count: MetadataCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = DirectoryTransport(tmp_path)
    transport.open_stream("donor")
    transport.beat("donor", 1)
    before = count.num_operations
    transport.beat("donor", 2)
    assert count.num_operations - before == 2, count.names[before:]
    before = count.num_operations
    assert transport.heartbeat("donor") == "2"
    assert count.num_operations - before == 1, count.names[before:]
    assert sorted(path.name for path in (tmp_path / "donor").iterdir()) == [
        "heartbeat", "records", "rejected",
    ]  # fmt: skip


def test_that_a_resting_heart_beats_more_slowly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.0)
    transport = DirectoryTransport(tmp_path)
    transport.open_stream("donor")
    heart = Heartbeat(transport, "donor")
    heart.stop()
    pauses: list[float] = []

    def wait(seconds: float) -> bool:
        pauses.append(seconds)
        heart.rests = True
        return len(pauses) == 2

    monkeypatch.setattr(liveness, "BEAT_SECONDS", 1.0)
    monkeypatch.setattr(heart._stop, "wait", wait)
    heart.rests = False
    heart._run()
    assert pauses == [1.0, RESTING_BEATS * 1.0]


class AtOnce:
    """In the place of a thread: what it is given is done when it returns."""

    def __init__(self, **settings: Any) -> None: ...

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args))
        return future

    def shutdown(self, **settings: Any) -> None: ...


def test_that_the_heart_of_a_job_that_trains_does_not_rest(
    tmp_path: Path, clock: SimulatedTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "ThreadPoolExecutor", AtOnce)
    receiver = ReceiverAlone(tmp_path / "runs", exchange="distill", peer_wait=60.0).receiver
    receiver._stop()
    assert receiver._heartbeat is not None
    assert not receiver._heartbeat.rests


@pytest.mark.parametrize("seconds", [4.0, 50.0])
@pytest.mark.parametrize("num_beats", [1, 30])
@pytest.mark.parametrize("is_full", [False, True])
def test_that_nobody_falls_silent_while_the_disk_fails(
    tmp_path: Path,
    clock: SimulatedTime,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    num_beats: int,
    is_full: bool,
) -> None:
    """In exchange auto a teacher takes over after 5 s of silence: of the donor, not of the disk."""
    monkeypatch.setattr(outage, "time", SimpleNamespace(monotonic=lambda: clock.now))
    job = ReceiverAlone(tmp_path / "runs", exchange="auto", peer_wait=60.0)
    waiting = Waiting(job.receiver, clock)
    waiting.job.config.peer_wait = 60.0
    job.backward()
    job.donate(job.constant(1.0))
    job.receiver.inject()
    assert job.receiver.commit()
    job.backward()

    fails, read = [False], os.open

    def fail(now: bool) -> None:
        fails[0] = now and not is_full  # a full disk can be read
        assert job.receiver._heartbeat is not None
        job.receiver._heartbeat.fails = now

    def opened(path: Any, *args: Any, **options: Any) -> int:
        if fails[0] and str(tmp_path) in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path, *args, **options)

    monkeypatch.setattr(os, "open", opened)
    for number in range(num_beats):
        clock.after(0.2 + number, lambda: waiting.beat("donor"))
    clock.after(num_beats, partial(fail, True))
    back = num_beats + seconds
    clock.after(back, partial(fail, False))
    # The donor needs a moment too, until it has seen that the disk works again.
    clock.after(back + 1.5, lambda: job.donate(job.constant(1.0)))
    start = clock.now
    job.receiver.inject()

    assert clock.now - start >= back + 1.5
    assert job.receiver.commit()
    assert (job.receiver.fates()["applied"], job.receiver.steps_alone) == (2, 0)


def test_that_a_heart_that_can_never_beat_ends_no_wait_late(
    tmp_path: Path, clock: SimulatedTime
) -> None:
    waiting = make("receiver", tmp_path, clock)
    assert waiting.job._heartbeat is not None
    waiting.job._heartbeat.fails = True
    assert PEER_WAIT <= waiting.decide() <= 2 * PEER_WAIT + 2.0


def test_that_a_heart_knows_whether_it_can_beat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = DirectoryTransport(tmp_path)
    transport.open_stream("donor")
    heart = Heartbeat(transport, "donor")
    heart.stop()
    beats: list[bool] = []
    name = tmp_path / "donor" / "heartbeat"

    def wait(seconds: float) -> bool:
        beats.append(not heart.fails)
        if len(beats) == 1:
            name.unlink()
            name.mkdir()  # which no file replaces
        elif len(beats) == 2:
            name.rmdir()
        return len(beats) == 3

    monkeypatch.setattr(heart._stop, "wait", wait)
    heart._run()
    assert beats == [True, False, True]
