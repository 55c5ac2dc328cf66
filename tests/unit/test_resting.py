"""A job whose peers have long been silent asks little of the file system, and misses nothing."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.jobs import DonorAlone, ReceiverAlone
from tests.unit.metadata import MetadataCounter, SimulatedTime
from toolkit.bridge import liveness, outage, teachers
from toolkit.bridge.donor import GradientDonor
from toolkit.bridge.errors import Interrupted
from toolkit.bridge.liveness import BEAT_SECONDS, RESTING_BEATS, Heartbeat
from toolkit.bridge.receiver import GradientReceiver
from toolkit.bridge.resting import GLANCE_SECONDS
from toolkit.bridge.transport import DirectoryTransport

pytestmark = pytest.mark.usefixtures("fresh_state")

PEER_WAIT = 3600.0
LOOK_SECONDS = 60.0  # between two whole looks, for one peer
QUIET_SECONDS = 10 * BEAT_SECONDS  # ten usual intervals between two signs of life
WINDOW = 120.0  # seconds over which operations are counted
PER_SECOND = 2.0  # operations of a job whose peer has long been silent, at most
HEART = 2 / (RESTING_BEATS * BEAT_SECONDS)  # of them, by its own heart
NOTICED_SECONDS = GLANCE_SECONDS + 1.0  # after a heart moves again, at most


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> SimulatedTime:
    return SimulatedTime(monkeypatch)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MetadataCounter:
    return MetadataCounter(tmp_path, monkeypatch)


class Waiting:
    """A job of this process that waits, in simulated time."""

    def __init__(self, job: GradientReceiver | GradientDonor, time: SimulatedTime) -> None:
        self.job, self.time, self.counter = job, time, 0
        job.config.peer_wait = PEER_WAIT
        assert job._heartbeat is not None
        job._heartbeat.stop()  # it beats in real time; what it costs is another test's

    def beat(self, peer: str) -> None:
        self.counter += 1
        self.job.transport.beat(peer, self.counter)

    def decide(self) -> float:
        """Wait for the peers; for how long."""
        start = self.time.now
        self.job._decide(self.job._poll, grace=0.0)
        return self.time.now - start


def waiting_receiver(
    tmp_path: Path, time: SimulatedTime, names: list[str], num_expected: int = 1
) -> Waiting:
    """A receiver before its first step, to which these donors have shown life."""
    alone = ReceiverAlone(tmp_path / "runs", exchange="gradient", num_donors=num_expected)
    waiting = Waiting(alone.receiver, time)
    for name in names:
        alone.receiver.transport.open_stream(name)
    if not names:
        (alone.receiver.transport.root / "donor" / "records").rmdir()
        (alone.receiver.transport.root / "donor" / "rejected").rmdir()
        (alone.receiver.transport.root / "donor").rmdir()
    alone.receiver._donors = alone.receiver._open_donors()
    alone.receiver._outbox._donors = alone.receiver._donors  # type: ignore[union-attr]
    alone.receiver._publish_weights()
    for name in names:
        time.after(0.1, partial(waiting.beat, name))
    return waiting


def waiting_donor(tmp_path: Path, time: SimulatedTime, is_there: bool) -> Waiting:
    alone = DonorAlone(tmp_path / "runs", exchange="gradient")
    waiting = Waiting(alone.donor, time)
    if is_there:
        alone.publish_weights(0, 0.5)
        waiting.beat("receiver")
        alone.donor._begin_window()
        alone.donor._publish_payload("skip", {}, None)
        alone.donor._wait = None
        time.after(0.1, lambda: waiting.beat("receiver"))
    return waiting


def make(case: str, tmp_path: Path, time: SimulatedTime) -> Waiting:
    if case.startswith("receiver"):
        names = {"receiver": ["donor"], "receiver of three": ["donor", "east", "west"]}
        return waiting_receiver(tmp_path, time, names.get(case, []))
    return waiting_donor(tmp_path, time, case == "donor")


CASES = ["receiver", "receiver of three", "receiver of nobody", "donor", "donor of nobody"]


@pytest.mark.parametrize("case", CASES)
def test_that_a_silent_peer_costs_two_operations_a_second_and_the_wait_ends_in_time(
    tmp_path: Path, time: SimulatedTime, count: MetadataCounter, case: str
) -> None:
    waiting = make(case, tmp_path, time)
    marks: list[int] = []
    windows = 20
    for window in range(windows + 1):
        at = QUIET_SECONDS + 3 + WINDOW * window
        time.after(at, lambda: marks.append(count.num_operations))
    waited = waiting.decide()

    first_sign = 0.0 if "nobody" in case else 0.1
    assert PEER_WAIT <= waited <= PEER_WAIT + first_sign + 1.1
    assert len(marks) == windows + 1
    costs = [(after - before) / WINDOW for before, after in pairwise(marks)]
    assert max(costs) + HEART <= PER_SECOND
    assert min(costs) >= 0.1, "it looks now and then"


@pytest.mark.parametrize("case", ["receiver", "receiver of three", "donor"])
def test_that_a_peer_that_comes_back_is_noticed(
    tmp_path: Path, time: SimulatedTime, case: str
) -> None:
    waiting = make(case, tmp_path, time)
    back = 1000.0
    peers = ["receiver"] if case == "donor" else waiting.job._on_main.names  # type: ignore[union-attr]
    looks: list[float] = []
    rest, lasts = waiting.job._rest, waiting.job._rest.lasts

    def lasting(waits: Any) -> bool:
        outcome = lasts(waits)
        if not outcome:
            looks.append(time.now)
        return outcome

    rest.lasts = lasting  # type: ignore[method-assign]
    start = time.now
    time.after(back, lambda: waiting.beat(peers[-1]))
    waiting.decide()
    first = min(look for look in looks if look >= start + back + 0.01) - start
    assert first - back <= NOTICED_SECONDS * len(peers)
    busy = [look for look in looks if 0 <= look - start - first < QUIET_SECONDS - 1]
    assert len(busy) >= QUIET_SECONDS, "and it is looked at as often as before"


def test_that_a_donor_that_nobody_knows_is_noticed(tmp_path: Path, time: SimulatedTime) -> None:
    waiting = make("receiver of nobody", tmp_path, time)
    transport = waiting.job.transport
    arrival, start = 1001.0, time.now
    found: list[float] = []

    def look() -> None:
        if not found and waiting.job._on_main.names:  # type: ignore[union-attr]
            found.append(time.now - start)
        time.after(0.1, look)

    # A job makes its directory first, and opens its stream when it has claimed its place.
    time.after(arrival, (transport.root / "east").mkdir)
    time.after(arrival + 4, lambda: transport.open_stream("east"))
    look()
    waiting.decide()
    assert found[0] <= arrival + 4 + 1.0


@pytest.mark.parametrize("case", ["receiver", "donor"])
def test_that_a_signal_is_answered_while_a_job_rests(
    tmp_path: Path, time: SimulatedTime, case: str
) -> None:
    waiting = make(case, tmp_path, time)
    interruption = waiting.job._interruption

    def get() -> None:
        interruption.signal = signal.SIGTERM
        interruption._since = -1e9

    at, start = 500.0, time.now
    time.after(at, get)
    with pytest.raises(Interrupted):
        waiting.decide()
    assert time.now - start <= at + 0.6, "a pause"


def test_that_nothing_is_given_up_without_a_look(tmp_path: Path, time: SimulatedTime) -> None:
    alone = DonorAlone(tmp_path / "runs", exchange="gradient")
    waiting = Waiting(alone.donor, time)
    time.after(PEER_WAIT - 0.6, lambda: alone.publish_weights(0, 0.5))  # without a heart
    decision, _ = alone.donor._decide(alone.donor._poll, grace=0.0)
    assert decision.action == "follow"
    assert waiting.counter == 0


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


@pytest.mark.parametrize("case", ["receiver", "donor"])
def test_that_a_record_without_a_heartbeat_is_found(
    tmp_path: Path, time: SimulatedTime, case: str
) -> None:
    at = 1000.0
    if case == "donor":
        alone = DonorAlone(tmp_path / "runs", exchange="gradient")
        waiting = Waiting(alone.donor, time)
        time.after(at, lambda: alone.publish_weights(0, 0.5))
    else:
        job = ReceiverAlone(tmp_path / "runs", exchange="gradient")
        waiting = Waiting(job.receiver, time)
        job.receiver._publish_weights()
        time.after(at, lambda: job.donate(job.constant(1.0)))
    assert waiting.decide() <= at + LOOK_SECONDS + 0.6


@pytest.mark.parametrize("exchange", ["distill", "head"])
@pytest.mark.parametrize("last_beat", [0, 30])
def test_that_the_wait_before_the_first_step_ends_in_time(
    tmp_path: Path, time: SimulatedTime, exchange: str, last_beat: int
) -> None:
    transport = DirectoryTransport(tmp_path / "runs" / "0001" / "bridge")
    for beat in range(2, last_beat + 1):
        if beat == 2:
            time.after(1, lambda: transport.open_stream("donor"))
        time.after(beat, partial(transport.beat, "donor", beat))
    start, patience = time.now, 60.0
    settings: Any = {"init_h2": "donor"} if exchange == "head" else {}
    job = ReceiverAlone(tmp_path / "runs", exchange=exchange, peer_wait=patience, **settings)
    Waiting(job.receiver, time)
    if exchange == "head":
        job.receiver.config.peer_wait = patience
        job.receiver._take_heads()
    expected = patience + (last_beat if exchange == "head" else 0)
    assert expected <= time.now - start <= expected + 1.5


class AtOnce:
    """In the place of a thread: what it is given is done when it returns."""

    def __init__(self, **settings: Any) -> None: ...

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args))
        return future

    def shutdown(self, **settings: Any) -> None: ...


def test_that_the_heart_of_a_job_that_trains_does_not_rest(
    tmp_path: Path, time: SimulatedTime, monkeypatch: pytest.MonkeyPatch
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
    time: SimulatedTime,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    num_beats: int,
    is_full: bool,
) -> None:
    """In exchange auto a teacher takes over after 5 s of silence: of the donor, not of the disk."""
    monkeypatch.setattr(outage, "time", SimpleNamespace(monotonic=lambda: time.now))
    job = ReceiverAlone(tmp_path / "runs", exchange="auto", peer_wait=60.0)
    waiting = Waiting(job.receiver, time)
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
        time.after(0.2 + number, lambda: waiting.beat("donor"))
    time.after(num_beats, partial(fail, True))
    back = num_beats + seconds
    time.after(back, partial(fail, False))
    # The donor needs a moment too, until it has seen that the disk works again.
    time.after(back + 1.5, lambda: job.donate(job.constant(1.0)))
    start = time.now
    job.receiver.inject()

    assert time.now - start >= back + 1.5
    assert job.receiver.commit()
    assert (job.receiver.fates()["applied"], job.receiver.steps_alone) == (2, 0)


def test_that_a_heart_that_can_never_beat_ends_no_wait_late(
    tmp_path: Path, time: SimulatedTime
) -> None:
    waiting = make("receiver", tmp_path, time)
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


def test_that_jobs_that_stood_still_together_after_a_long_wait_are_not_silent(
    tmp_path: Path, time: SimulatedTime
) -> None:
    job = ReceiverAlone(tmp_path / "runs", exchange="gradient")
    waiting = Waiting(job.receiver, time)
    job.receiver.config.peer_wait = 15.0
    job.receiver._publish_weights()
    for number in range(40):
        time.after(number, lambda: waiting.beat("donor"))

    def stand_still() -> None:
        time.now += 100.0

    time.after(39.5, stand_still)
    time.after(139.5 + 1.0, lambda: job.donate(job.constant(1.0)))
    assert waiting.decide() >= 140.0
    assert job.receiver._on_main.num_away == 0
