"""What unit tests have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.gates import Gate
from tests.unit.jobs import DonorAlone, ReceiverAlone, StartDonor, StartReceiver, reset
from tests.unit.metadata import MetadataCounter, SimulatedTime
from tests.unit.run_files import Inspect, SmallRun, inspecting
from tests.unit.starts import Jobs
from tests.unit.streams import Bridge
from tests.unit.teaching import Learners, Receiver
from toolkit.bridge import inbox, liveness, runs, teachers
from toolkit.bridge.transport import DirectoryTransport


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """Nothing of one test's Accelerator is left for the next."""
    reset()
    yield
    reset()


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Inspect:
    """``gradient-bridge inspect`` of one run, with a short look at hearts."""
    return inspecting(capsys, 0.02)


@pytest.fixture
def small(tmp_path: Path, fresh_state: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallRun]:
    """A run of a receiver in this process, with payloads of every fate."""
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.01)
    run = SmallRun(tmp_path / "runs", keep_payloads=True)
    yield run
    run.receiver.close()


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """Jobs without a model. The living beat every 10 ms; who is silent for 5 x 0.2 s is dead."""
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(runs, "BEAT_SECONDS", 0.2)
    jobs = Jobs(tmp_path / "runs")
    yield jobs
    jobs.kill_all()


def _starting(kind: Callable[..., Any], tmp_path: Path, role: str) -> Iterator[Callable[..., Any]]:
    jobs: list[Any] = []

    def build(name: str = "runs", **settings: Any) -> Any:
        reset()
        jobs.append(kind(tmp_path / name, **settings))
        return jobs[-1]

    yield build
    for job in jobs:
        getattr(job, role).close()
    reset()


@pytest.fixture
def start_receiver(tmp_path: Path) -> Iterator[StartReceiver]:
    """Starts receivers in a directory below ``tmp_path``, as if each was a process of its own."""
    yield from _starting(ReceiverAlone, tmp_path, "receiver")


@pytest.fixture
def start_donor(tmp_path: Path) -> Iterator[StartDonor]:
    """The same of donors."""
    yield from _starting(DonorAlone, tmp_path, "donor")


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A gloo group of this process alone."""
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def make_bridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bridge]:
    """Makes a donor's stream and an inbox over it, on the stream's own clock."""

    def build(**settings: Any) -> Bridge:
        bridge = Bridge(DirectoryTransport(tmp_path), **settings)
        monkeypatch.setattr(inbox, "time", SimpleNamespace(monotonic=lambda: bridge.now))
        return bridge

    return build


@pytest.fixture
def bridge(make_bridge: Callable[..., Bridge]) -> Bridge:
    """One of them with the usual settings."""
    return make_bridge()


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The inodes of what is synced to the disk, in order."""
    found: list[int] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        found.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return found


@pytest.fixture
def transport(tmp_path: Path) -> DirectoryTransport:
    """A transport in which a donor has opened its stream."""
    transport = DirectoryTransport(tmp_path / "bridge")
    transport.open_stream("donor")
    return transport


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimulatedTime:
    """The clock of all waits, which moves only when told to, or slept on."""
    return SimulatedTime(monkeypatch)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MetadataCounter:
    """Counts what this thread asks the file system about the test's directory."""
    return MetadataCounter(tmp_path, monkeypatch)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Gate]]:
    """Makes gates of streams, which are open again when the test ends."""
    gates: list[Gate] = []

    def build(stream: str) -> Gate:
        gates.append(Gate(monkeypatch, stream))
        return gates[-1]

    yield build
    for each in gates:
        each.open()
    reset()


@pytest.fixture
def runs_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of runs whose receivers look for new weights in every step."""
    monkeypatch.setattr(teachers, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(runs, "BEAT_SECONDS", 0.1)  # who is silent for 5 of them is dead
    return tmp_path / "runs"


@pytest.fixture
def learner(runs_dir: Path) -> Iterator[Learners]:
    """Starts receivers that learn from a teacher."""
    started: list[Receiver] = []

    def build(settings: dict[str, Any] | None = None, **keywords: Any) -> Receiver:
        started.append(Receiver(runs_dir, settings or {}, **keywords))
        return started[-1]

    yield build
    for job in started:
        job.receiver.close()
    reset()
