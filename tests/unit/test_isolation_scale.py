"""Two optimizers that share one loss scaler."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.unit.jobs import build_accelerator, reset
from tests.unit.test_isolation import Models, build, data, rmsprops, same
from toolkit.isolation import CutPoint, backward_for, one_loss_scale

pytestmark = pytest.mark.usefixtures("fresh_state")


def scaled_windows(models: Models, *, hold: bool) -> None:
    """Two accumulated windows under a scaler, whose scale halves at model1's first step."""
    reset()
    accelerator = build_accelerator(accumulation=2, init_scale=1024.0)
    model1, model2 = (accelerator.prepare(model) for model in models)
    accelerator.native_amp = True
    optimizer1, optimizer2 = (accelerator.prepare(optimizer) for optimizer in rmsprops(models))
    for step in range(4):
        latents, real = data(step)
        held = one_loss_scale(accelerator) if hold else contextlib.nullcontext()
        with accelerator.accumulate(model1, model2), held:
            cut = CutPoint(model2(latents), model2)
            loss1 = model1(cut.detached).mean() - model1(real).mean()
            backward_for(loss1 * (torch.inf if step == 1 else 1), model1, accelerator)
            optimizer1.step()
            optimizer1.zero_grad()
            cut.backward(-model1(cut.attached).mean(), accelerator)
            optimizer2.step()
            optimizer2.zero_grad()
    assert accelerator.scaler.get_scale() == 512.0


def unscaled_windows(models: Models) -> None:
    """The same in plain torch, model1's first step left out."""
    model1, model2 = models
    optimizer1, optimizer2 = rmsprops(models)
    for step in range(4):
        latents, real = data(step)
        fake = model2(latents)
        ((model1(fake.detach()).mean() - model1(real).mean()) / 2).backward()
        if step == 3:
            optimizer1.step()
        if step in (1, 3):
            optimizer1.zero_grad()
        wanted = torch.autograd.grad(-model1(fake).mean() / 2, list(model2.parameters()))
        for parameter, grad in zip(model2.parameters(), wanted, strict=True):
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        if step in (1, 3):
            optimizer2.step()
            optimizer2.zero_grad()


def test_that_one_loss_scale_serves_two_optimizers() -> None:
    expected, held, naive = build(), build(), build()
    unscaled_windows(expected)
    scaled_windows(held, hold=True)
    scaled_windows(naive, hold=False)
    assert all(same(one, other) for one, other in zip(held, expected, strict=True))
    assert same(naive[0], expected[0]) is False  # the wrong generator has reached the critic
    assert not same(naive[1], expected[1])
