"""What unit tests have in common."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.jobs import reset
from tests.unit.run_files import Inspect, SmallRun, inspecting
from toolkit.bridge import liveness


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
