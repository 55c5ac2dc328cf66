"""Compressed payloads at a receiver: applied, replayed and refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.jobs import ReceiverAlone, StartReceiver, weights_of
from toolkit.bridge.compression import ErrorFeedback
from toolkit.parameters import same_bits

pytestmark = pytest.mark.usefixtures("fresh_state")


def build_sums(job: ReceiverAlone) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for name, tensor in job.constant(0.0).items()
    }


def take_step(job: ReceiverAlone, tensors: dict[str, Tensor] | None, **header: Any) -> None:
    with job.accelerator.accumulate(job.model):
        job.backward()
        if tensors is not None:
            job.donate(tensors, **header)
        job.receiver.inject()
        job.optimizer.step()
        job.optimizer.zero_grad()
        assert job.receiver.commit()


@pytest.mark.parametrize("compression", ["topk", "bf16"])
def test_that_a_receiver_and_a_replay_apply_what_was_sent(
    start_receiver: StartReceiver, compression: str
) -> None:
    plain = start_receiver("plain")
    sums = build_sums(plain)
    if compression == "topk":
        sent, residual = ErrorFeedback(0.2).encode(sums, 4.0)
        left = residual.split([sums[name].numel() for name in sorted(sums)])
        dense = {
            name: sums[name] - 4.0 * part.view_as(sums[name])
            for name, part in zip(sorted(sums), left, strict=True)
        }
    else:
        sent = {name: tensor.bfloat16() for name, tensor in sums.items()}
        dense = {name: tensor.double() for name, tensor in sent.items()}
    take_step(plain, dense)
    job = start_receiver("runs", keep_payloads=True)
    take_step(job, sent, compression=compression)
    assert job.receiver.fates()["applied"] == 1
    for name, tensor in weights_of(job.network).items():
        assert torch.allclose(tensor, weights_of(plain.network)[name], rtol=0, atol=1e-14), name
    size = job.receiver.metrics["bridge/payload donor (MiB)"] * 2**20
    assert size == job.receiver.transport.kept_path("donor", 0).stat().st_size
    job.receiver.close()
    replay = start_receiver("replay", replay=job.receiver.run_dir)
    take_step(replay, None)
    assert replay.receiver.fates()["applied"] == 1
    for name, tensor in weights_of(replay.network).items():
        assert same_bits(tensor, weights_of(job.network)[name]), name


def spoil(sent: dict[str, Tensor], name: str, value: float) -> dict[str, Tensor]:
    sent[name][0] = value
    return sent


@pytest.mark.parametrize(
    ("spoiled", "header", "reason"),
    [
        (lambda sent: sent, {"compression": "bf16"}, "schema"),
        (lambda sent: sent, {"compression": "none"}, "schema"),
        (lambda sent: spoil(sent, "places", 32767), {}, "malformed"),
        (lambda sent: spoil(sent, "counts", 3), {}, "malformed"),
        (lambda sent: spoil(sent, "values", math.nan), {}, "nonfinite"),
        (lambda sent: spoil(sent, "values", math.inf), {}, "nonfinite"),
        (lambda sent: {"w" * 9: torch.ones(3).bfloat16()}, {"compression": "bf16"}, "schema"),
        (lambda sent: {}, {"kind": "skip"}, "malformed"),
        (lambda sent: sent, {"compression": "zip"}, "malformed"),
        (lambda sent: sent, {"count": 0.0}, "count"),
    ],
)
def test_that_a_malformed_payload_is_rejected_and_training_goes_on(
    start_receiver: StartReceiver,
    spoiled: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    header: dict[str, Any],
    reason: str,
) -> None:
    job = start_receiver("runs")
    sent, _ = ErrorFeedback(0.2).encode(build_sums(job), 4.0)
    take_step(job, spoiled(sent), **{"compression": "topk"} | header)
    assert job.receiver.transport.rejection("donor", 0) == reason
    assert (job.receiver.fates()["rejected"], job.receiver.steps_alone) == (1, 1)
