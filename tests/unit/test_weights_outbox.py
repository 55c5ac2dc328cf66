"""What is published behind a step, and again within one: by the digest that was committed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from tests.unit.jobs import ReceiverAlone, look_once, reset
from toolkit import BridgeConfig, GradientReceiver
from toolkit.bridge import runs
from toolkit.bridge.digests import Digest
from toolkit.bridge.payload import parse_record

PATIENCE_SECONDS = 30.0  # of this test, where something hangs


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    reset()
    yield
    reset()


class NormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.heads = nn.ModuleDict({"h1": nn.Linear(8, 3), "h2": nn.Linear(8, 4)})


@pytest.mark.parametrize("settings", [{}, {"max_staleness": 2}], ids=["lockstep", "late"])
def test_that_weights_for_a_donor_that_comes_late_can_be_read(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """A forward has changed BatchNorm's statistics since these weights were taken."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    network = NormNet()
    network.heads["h2"].requires_grad_(False)
    model, optimizer = accelerator.prepare(network, torch.optim.SGD(network.parameters(), lr=0.1))
    config = BridgeConfig(runs_dir=tmp_path / "runs", peer_wait=0.2, **settings)
    receiver = GradientReceiver(accelerator, model, optimizer, config)
    transport = receiver.transport
    transport.open_stream("donor")

    def backward() -> None:
        hidden = network.backbone(torch.randn(5, 6))
        receiver.backward(F.cross_entropy(network.heads["h1"](hidden), torch.arange(5) % 3), 5)

    backward()
    receiver.inject()  # the donor does not come: nobody is there to read the next weights
    optimizer.step()
    receiver.commit()
    receiver._waiting.catch_up()
    before = transport.sequences("receiver")
    mean = network.get_buffer("backbone.1.running_mean")
    committed = mean.clone()
    backward()
    assert not torch.equal(mean, committed)
    with torch.no_grad():
        network.get_parameter("backbone.0.weight").add_(1.0)  # as loading a checkpoint does
    transport.beat("donor", 1)
    receiver._collector.on_main.begin()
    look_once(receiver)
    (newest,) = set(transport.sequences("receiver")) - set(before)
    data = transport.read("receiver", newest, max_bytes=10**6)
    record = parse_record(data, transport.signer)
    assert record.header.receiver_step == 1
    assert torch.equal(record.tensors["backbone.1.running_mean"], committed)
    receiver.close()


class SlowDigests:
    """Holds up the digests that a thread waits for, while it is closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        self._open.set()
        result = Digest.result

        def held(digest: Digest) -> str:
            if threading.current_thread() is not threading.main_thread():
                assert self._open.wait(PATIENCE_SECONDS)
            return result(digest)

        monkeypatch.setattr(Digest, "result", held)

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()


def test_that_a_replay_knows_its_weights_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ReceiverAlone(tmp_path / "runs", max_staleness=2, keep_payloads=True)
    job.backward()
    job.donate(job.constant(1.0))
    job.receiver.inject()
    job.optimizer.step()
    job.receiver.commit()
    job.receiver.close()
    reset()
    replay = ReceiverAlone(tmp_path / "replay", max_staleness=2, replay=job.receiver.run_dir)
    slow = SlowDigests(monkeypatch)
    slow.close()
    replay.backward()
    replay.receiver.inject()
    slow.open()
    assert replay.receiver.evidence({})["departed_at"] is None
    replay.optimizer.step()
    replay.receiver.commit()
    assert replay.receiver.fates()["applied"] == 1
    replay.receiver.close()


def test_that_a_payload_is_judged_once_the_digest_of_its_weights_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new start comes to the weights that a payload of the one before was taken at."""
    monkeypatch.setattr(runs, "BEAT_SECONDS", 0.2)  # it waits for the killed job's silence
    settings: dict[str, Any] = {"run": "one", "checkpoint_interval": 1, "max_staleness": 2}
    killed = ReceiverAlone(tmp_path / "runs", **settings)
    killed.backward()
    killed.donate(killed.constant(1.0))
    killed.receiver._stop()
    reset()
    job = ReceiverAlone(tmp_path / "runs", **settings)
    slow = SlowDigests(monkeypatch)
    slow.close()
    for _ in range(2):
        job.backward()
        job.receiver.inject()
        slow.open()
        job.optimizer.step()
        job.receiver.commit()
        job.receiver._waiting.catch_up()
    fates = job.receiver.fates()
    assert (fates["applied"], fates["dropped"]) == (1, 0)
    job.receiver.close()
