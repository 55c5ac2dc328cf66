"""Accumulated micro-batches against one batch of all of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.unit.rotograd_oracle import build, data, losses_of
from toolkit.rotograd import RotateOnly, RotoGrad, RotoGradNorm

PARTS = 4


def grads(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def accumulate(model: Any, step: int) -> dict[str, torch.Tensor]:
    for inputs in data(step, 64).chunk(PARTS):
        (model.total(losses_of(model(inputs), inputs)) / PARTS).backward()
    return grads(model)


def whole(model: Any, step: int) -> dict[str, torch.Tensor]:
    inputs = data(step, 64)
    model.total(losses_of(model(inputs), inputs)).backward()
    return grads(model)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("coop", [False, True], ids=["", "coop"])
@pytest.mark.parametrize("kind", [RotateOnly, RotoGrad, RotoGradNorm])
def test_that_exact_accumulation_is_one_batch(
    kind: type[RotateOnly], coop: bool, to_none: bool
) -> None:
    exact = build(kind, burn_in_period=2, exact_accumulation=True).coop(coop)
    plain = build(kind, burn_in_period=2).coop(coop)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9) for m in (exact, plain)]
    for step in range(5):
        torch.testing.assert_close(accumulate(exact, step), whole(plain, step), rtol=0, atol=1e-12)
        for optimizer in optimizers:
            if step != 3:  # as when a loss scaler skips it
                optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
    assert exact.completed_steps == plain.completed_steps == 4


class Checkpointed(nn.Module):
    def __init__(self, module: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.module, self.use_reentrant = module, use_reentrant

    def forward(self, inputs: torch.Tensor) -> Any:
        return checkpoint(self.module, inputs.requires_grad_(), use_reentrant=self.use_reentrant)


def test_that_a_reentrant_checkpoint_is_refused() -> None:
    plain, model = build(RotoGrad), build(RotoGrad, exact_accumulation=True)
    expected = list(whole(plain, 0).values())
    model.backbone = Checkpointed(model.backbone, use_reentrant=False)
    torch.testing.assert_close(list(accumulate(model, 0).values()), expected, rtol=0, atol=1e-12)
    model.backbone.use_reentrant = True
    model.zero_grad()
    with pytest.raises(ValueError, match="use_reentrant=False"):
        accumulate(model, 1)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_that_a_task_in_one_micro_batch_has_a_first_norm(order: tuple[int, int]) -> None:
    model = build(RotoGradNorm, burn_in_period=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(2):
        optimizer.zero_grad()
        for absent in order:
            losses = losses_of(model(data(step)), data(step))
            model.backward([None if k == absent else loss for k, loss in enumerate(losses)])
        values = torch.stack(losses_of(model(data(step)), data(step)))
        optimizer.step()
        first = model.get_extra_state()[-3:]
        torch.testing.assert_close(first, values.detach())


def test_how_far_micro_batches_are_from_one_batch() -> None:
    """What the default costs: a few per cent, and none where the norms do not matter."""
    for kind, least, most in ((RotateOnly, 0.0, 1e-12), (RotoGrad, 1e-3, 0.2)):
        model = build(kind)
        parts, batch = (
            torch.cat([grad.flatten() for name, grad in found.items() if "backbone" in name])
            for found in (accumulate(copy.deepcopy(model), 0), whole(model, 0))
        )
        assert least <= (parts - batch).norm() / batch.norm() <= most
