"""Weights that are published again, once a step has begun, are those that were committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from tests.unit.jobs import reset
from toolkit import BridgeConfig, GradientReceiver
from toolkit.bridge.payload import parse_record


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
    reset()
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
    receiver._catch_up()
    before = transport.sequences("receiver")
    backward()
    transport.beat("donor", 1)
    receiver._on_main.begin()
    receiver._poll()
    (newest,) = set(transport.sequences("receiver")) - set(before)
    data = transport.read("receiver", newest, max_bytes=10**6)
    assert parse_record(data, transport.signer).header.receiver_step == 1
    receiver.close()
    reset()
