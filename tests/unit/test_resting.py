"""A job whose peers have long been silent asks little of the file system, and misses nothing."""

from __future__ import annotations

import signal
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.unit.jobs import DonorAlone, ReceiverAlone
from tests.unit.metadata import MetadataCounter, SimulatedTime
from tests.unit.waiting import PEER_WAIT, Waiting, make
from toolkit.bridge.errors import Interrupted
from toolkit.bridge.liveness import BEAT_SECONDS, RESTING_BEATS
from toolkit.bridge.resting import GLANCE_SECONDS
from toolkit.bridge.transport import DirectoryTransport

pytestmark = pytest.mark.usefixtures("fresh_state")

LOOK_SECONDS = 60.0  # between two whole looks, for one peer
QUIET_SECONDS = 10 * BEAT_SECONDS  # ten usual intervals between two signs of life
WINDOW = 120.0  # seconds over which operations are counted
PER_SECOND = 2.0  # operations of a job whose peer has long been silent, at most
HEART = 2 / (RESTING_BEATS * BEAT_SECONDS)  # of them, by its own heart
NOTICED_SECONDS = GLANCE_SECONDS + 1.0  # after a heart moves again, at most


CASES = ["receiver", "receiver of three", "receiver of nobody", "donor", "donor of nobody"]


@pytest.mark.parametrize("case", CASES)
def test_that_a_silent_peer_costs_two_operations_a_second_and_the_wait_ends_in_time(
    tmp_path: Path, clock: SimulatedTime, count: MetadataCounter, case: str
) -> None:
    waiting = make(case, tmp_path, clock)
    marks: list[int] = []
    windows = 20
    for window in range(windows + 1):
        at = QUIET_SECONDS + 3 + WINDOW * window
        clock.after(at, lambda: marks.append(count.num_operations))
    waited = waiting.decide()

    first_sign = 0.0 if "nobody" in case else 0.1
    assert PEER_WAIT <= waited <= PEER_WAIT + first_sign + 1.1
    assert len(marks) == windows + 1
    costs = [(after - before) / WINDOW for before, after in pairwise(marks)]
    assert max(costs) + HEART <= PER_SECOND
    assert min(costs) >= 0.1, "it looks now and then"


@pytest.mark.parametrize("case", ["receiver", "receiver of three", "donor"])
def test_that_a_peer_that_comes_back_is_noticed(
    tmp_path: Path, clock: SimulatedTime, case: str
) -> None:
    waiting = make(case, tmp_path, clock)
    back = 1000.0
    peers = ["receiver"] if case == "donor" else waiting.job._collector.on_main.names  # type: ignore[union-attr]
    looks: list[float] = []
    rest, lasts = waiting.job._waiting.rest, waiting.job._waiting.rest.lasts

    def lasting(waits: Any) -> bool:
        outcome = lasts(waits)
        if not outcome:
            looks.append(clock.now)
        return outcome

    rest.lasts = lasting  # type: ignore[method-assign]
    start = clock.now
    clock.after(back, lambda: waiting.beat(peers[-1]))
    waiting.decide()
    first = min(look for look in looks if look >= start + back + 0.01) - start
    assert first - back <= NOTICED_SECONDS * len(peers)
    busy = [look for look in looks if 0 <= look - start - first < QUIET_SECONDS - 1]
    assert len(busy) >= QUIET_SECONDS, "and it is looked at as often as before"


def test_that_a_donor_that_nobody_knows_is_noticed(tmp_path: Path, clock: SimulatedTime) -> None:
    waiting = make("receiver of nobody", tmp_path, clock)
    transport = waiting.job.transport
    arrival, start = 1001.0, clock.now
    found: list[float] = []

    def look() -> None:
        if not found and waiting.job._collector.on_main.names:  # type: ignore[union-attr]
            found.append(clock.now - start)
        clock.after(0.1, look)

    # A job makes its directory first, and opens its stream when it has claimed its place.
    clock.after(arrival, (transport.root / "east").mkdir)
    clock.after(arrival + 4, lambda: transport.open_stream("east"))
    look()
    waiting.decide()
    assert found[0] <= arrival + 4 + 1.0


@pytest.mark.parametrize("case", ["receiver", "donor"])
def test_that_a_signal_is_answered_while_a_job_rests(
    tmp_path: Path, clock: SimulatedTime, case: str
) -> None:
    waiting = make(case, tmp_path, clock)
    interruption = waiting.job._waiting.interruption

    def get() -> None:
        interruption.signal = signal.SIGTERM
        interruption._since = -1e9

    at, start = 500.0, clock.now
    clock.after(at, get)
    with pytest.raises(Interrupted):
        waiting.decide()
    assert clock.now - start <= at + 0.6, "a pause"


def test_that_nothing_is_given_up_without_a_look(tmp_path: Path, clock: SimulatedTime) -> None:
    alone = DonorAlone(tmp_path / "runs", exchange="gradient")
    waiting = Waiting(alone.donor, clock)
    clock.after(PEER_WAIT - 0.6, lambda: alone.publish_weights(0, 0.5))  # without a heart
    decision = alone.donor._waiting.decide(alone.donor._poll, grace=0.0)
    assert decision.action == "follow"
    assert waiting.counter == 0


@pytest.mark.parametrize("case", ["receiver", "donor"])
def test_that_a_record_without_a_heartbeat_is_found(
    tmp_path: Path, clock: SimulatedTime, case: str
) -> None:
    at = 1000.0
    if case == "donor":
        alone = DonorAlone(tmp_path / "runs", exchange="gradient")
        waiting = Waiting(alone.donor, clock)
        clock.after(at, lambda: alone.publish_weights(0, 0.5))
    else:
        job = ReceiverAlone(tmp_path / "runs", exchange="gradient")
        waiting = Waiting(job.receiver, clock)
        job.receiver._publish_weights()
        clock.after(at, lambda: job.donate(job.constant(1.0)))
    assert waiting.decide() <= at + LOOK_SECONDS + 0.6


@pytest.mark.parametrize("exchange", ["distill", "head"])
@pytest.mark.parametrize("last_beat", [0, 30])
def test_that_the_wait_before_the_first_step_ends_in_time(
    tmp_path: Path, clock: SimulatedTime, exchange: str, last_beat: int
) -> None:
    transport = DirectoryTransport(tmp_path / "runs" / "0001" / "bridge")
    for beat in range(2, last_beat + 1):
        if beat == 2:
            clock.after(1, lambda: transport.open_stream("donor"))
        clock.after(beat, partial(transport.beat, "donor", beat))
    start, patience = clock.now, 60.0
    settings: Any = {"init_h2": "donor"} if exchange == "head" else {}
    job = ReceiverAlone(tmp_path / "runs", exchange=exchange, peer_wait=patience, **settings)
    Waiting(job.receiver, clock)
    if exchange == "head":
        job.receiver.config.peer_wait = patience
        job.receiver._collector.take_heads(job.receiver.shared)
    expected = patience + (last_beat if exchange == "head" else 0)
    assert expected <= clock.now - start <= expected + 1.5


def test_that_jobs_that_stood_still_together_after_a_long_wait_are_not_silent(
    tmp_path: Path, clock: SimulatedTime
) -> None:
    job = ReceiverAlone(tmp_path / "runs", exchange="gradient")
    waiting = Waiting(job.receiver, clock)
    job.receiver.config.peer_wait = 15.0
    job.receiver._publish_weights()
    for number in range(40):
        clock.after(number, lambda: waiting.beat("donor"))

    def stand_still() -> None:
        clock.now += 100.0

    clock.after(39.5, stand_still)
    clock.after(139.5 + 1.0, lambda: job.donate(job.constant(1.0)))
    assert waiting.decide() >= 140.0
    assert job.receiver._collector.on_main.num_away == 0
