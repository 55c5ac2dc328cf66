"""What unit tests have in common."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.jobs import reset
from tests.unit.run_files import Inspect, SmallRun, inspecting
from tests.unit.starts import Jobs
from toolkit.bridge import liveness, runs


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
