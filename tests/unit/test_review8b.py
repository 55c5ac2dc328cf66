from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.jobs import ReceiverAlone, reset
from toolkit.bridge.digests import Digest

PATIENCE_SECONDS = 30.0


class SlowDigests:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.open.set()
        result = Digest.result

        def held(digest: Digest) -> str:
            if threading.current_thread() is not threading.main_thread():
                assert self.open.wait(PATIENCE_SECONDS)
            return result(digest)

        monkeypatch.setattr(Digest, "result", held)


def take_step(job: ReceiverAlone, tensors: Any, **header: Any) -> None:
    with job.accelerator.accumulate(job.model):
        job.backward()
        if tensors is not None:
            job.donate(tensors, **header)
        job.receiver.inject()
        job.optimizer.step()
        job.optimizer.zero_grad()
        assert job.receiver.commit()


def test_that_a_replay_knows_its_weights_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reset()
    job = ReceiverAlone(tmp_path / "runs", max_staleness=2, keep_payloads=True)
    for _ in range(3):
        take_step(job, job.constant(1.0))
    job.receiver.close()
    reset()
    replay = ReceiverAlone(tmp_path / "replay", max_staleness=2, replay=job.receiver.run_dir)
    slow = SlowDigests(monkeypatch)
    for _ in range(3):
        slow.open.clear()
        with replay.accelerator.accumulate(replay.model):
            replay.backward()
            replay.receiver.inject()
            slow.open.set()
            replay.optimizer.step()
            replay.optimizer.zero_grad()
            slow.open.clear()
            opener = threading.Timer(0.1, slow.open.set)
            opener.start()
            replay.receiver.commit()
            opener.join()
    evidence = replay.receiver.evidence(replay.network.state_dict())
    replay.receiver.close()
    reset()
    assert evidence["departed_at"] is None


def test_that_a_resume_waits_for_no_digest_and_drops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Payloads that are still there were taken at weights whose digest is computed just now."""
    reset()
    runs = tmp_path / "runs"
    job = ReceiverAlone(runs, max_staleness=2, run="one", checkpoint_interval=1)
    job.backward()
    job.donate(job.constant(1.0))
    job.receiver._catch_up()
    job.receiver._stop()
    reset()
    from toolkit.bridge import runs as module
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.2)
    slow = SlowDigests(monkeypatch)
    again = ReceiverAlone(runs, max_staleness=2, run="one", checkpoint_interval=1)
    slow.open.clear()
    again.backward()
    again.receiver.inject()
    again.optimizer.step()
    slow.open.set()
    again.receiver.commit()
    again.backward()
    again.receiver.inject()
    again.optimizer.step()
    again.receiver.commit()
    print(again.receiver.fates())
    assert again.receiver.fates()["applied"] == 1
    again.receiver.close()
    reset()
