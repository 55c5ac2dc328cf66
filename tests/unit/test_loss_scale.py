"""A followed loss scale moves as a scaler's own does in a training loop of one job."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from toolkit.bridge.loss_scale import FollowedLossScale

pytestmark = pytest.mark.usefixtures("fresh_state")

INTERVAL = 3
OUTCOMES = [True] * 2 + [False] + [True] * 7 + [False] * 2 + [True] * 4  # whether it was finite


def scaler() -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**10, growth_factor=4.0, growth_interval=INTERVAL
    )
    scaler.scale(torch.ones(()))  # as a first backward does
    return scaler


def test_that_it_moves_as_in_a_training_loop() -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = followed = scaler()
    loss_scale = FollowedLossScale(accelerator)
    trained = scaler()
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], 0.1)
    scales = set()
    for was_finite in OUTCOMES:
        parameter.grad = torch.full((2,), 1.0 if was_finite else torch.inf)
        trained.step(optimizer)
        trained.update()
        loss_scale.update(was_finite, followed.get_scale())
        assert followed.get_scale() == trained.get_scale()
        scales.add(followed.get_scale())
    assert len(scales) >= 4, "the scale did not move"


def test_that_a_job_without_a_scaler_has_no_scale_to_follow() -> None:
    accelerator = Accelerator(cpu=True)
    FollowedLossScale(accelerator).update(False, 1.0)
    accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)
    FollowedLossScale(accelerator).update(False, 1.0)
