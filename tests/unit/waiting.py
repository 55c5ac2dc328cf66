"""Jobs of this process that wait for their peers, in simulated time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests.unit.jobs import DonorAlone, ReceiverAlone, look_once
from tests.unit.metadata import SimulatedTime
from toolkit.bridge.donor import GradientDonor
from toolkit.bridge.receiver import GradientReceiver

PEER_WAIT = 3600.0


class Waiting:
    """A job of this process that waits, in simulated time."""

    def __init__(self, job: GradientReceiver | GradientDonor, clock: SimulatedTime) -> None:
        self.job, self.clock, self.counter = job, clock, 0
        job.config.peer_wait = PEER_WAIT
        assert job._heartbeat is not None
        job._heartbeat.stop()  # it beats in real time; what it costs is another test's

    def beat(self, peer: str) -> None:
        self.counter += 1
        self.job.transport.beat(peer, self.counter)

    def decide(self) -> float:
        """Wait for the peers; for how long."""
        start = self.clock.now
        job = self.job
        look = partial(look_once, job) if isinstance(job, GradientReceiver) else job._poll
        job._waiting.decide(look, grace=0.0)
        return self.clock.now - start


def waiting_receiver(tmp_path: Path, clock: SimulatedTime, names: list[str]) -> Waiting:
    """A receiver before its first step, to which these donors have shown life."""
    alone = ReceiverAlone(tmp_path / "runs", exchange="gradient")
    waiting = Waiting(alone.receiver, clock)
    for name in names:
        alone.receiver.transport.open_stream(name)
    if not names:
        (alone.receiver.transport.root / "donor" / "records").rmdir()
        (alone.receiver.transport.root / "donor" / "rejected").rmdir()
        (alone.receiver.transport.root / "donor").rmdir()
    alone.receiver._collector.donors = alone.receiver._open_donors()
    alone.receiver._outbox._donors = alone.receiver._collector.donors  # type: ignore[union-attr]
    alone.receiver._publish_weights()
    for name in names:
        clock.after(0.1, partial(waiting.beat, name))
    return waiting


def waiting_donor(tmp_path: Path, clock: SimulatedTime, is_there: bool) -> Waiting:
    alone = DonorAlone(tmp_path / "runs", exchange="gradient")
    waiting = Waiting(alone.donor, clock)
    if is_there:
        alone.publish_weights(0, 0.5)
        waiting.beat("receiver")
        alone.donor._begin_window()
        alone.donor._publish_payload("skip", {}, None)
        alone.donor._next_window.begin()
        clock.after(0.1, lambda: waiting.beat("receiver"))
    return waiting


def make(case: str, tmp_path: Path, clock: SimulatedTime) -> Waiting:
    if case.startswith("receiver"):
        names = {"receiver": ["donor"], "receiver of three": ["donor", "east", "west"]}
        return waiting_receiver(tmp_path, clock, names.get(case, []))
    return waiting_donor(tmp_path, clock, case == "donor")
