"""RotoGrad and its kin against plain autograd, in one process."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.rotograd_oracle import SIZE, Oracle, build, data, gradients_of, losses_of
from toolkit.rotograd import RotateOnly, RotoGrad, RotoGradNorm, VanillaMTL, total

KINDS = [RotateOnly, RotoGrad, RotoGradNorm]
CASES: dict[str, tuple[type[RotateOnly], dict[str, Any]]] = {
    "rotate": (RotateOnly, {}),
    "rotograd": (RotoGrad, {}),
    "two-tasks": (RotoGrad, {"num_tasks": 2}),
    "identity": (RotoGrad, {"init": "identity"}),
    "partial": (RotoGrad, {"size_rotation": 4}),
    "odd": (RotoGrad, {"size_rotation": 5}),
    "norm": (RotoGradNorm, {"alpha": 1.5}),
    "norm-alpha-0": (RotoGradNorm, {"alpha": 0.0}),
}


def close(model: Any, expected: dict[str, Tensor | None], tolerance: float = 1e-12) -> None:
    for name, grad in gradients_of(model).items():
        wanted = expected[name]
        assert (grad is None) == (wanted is None), name
        if wanted is not None:
            scale = max(wanted.abs().max().item(), 1e-3)
            torch.testing.assert_close(grad, wanted, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("coop", [False, True], ids=["", "coop"])
@pytest.mark.parametrize("name", CASES)
def test_that_gradients_are_those_of_the_equations(name: str, coop: bool) -> None:
    kind, options = CASES[name]
    model = build(kind, burn_in_period=3, **options).coop(coop)
    oracle = Oracle(model)
    optimizer = torch.optim.Adam(model.param_groups(lr=1e-2, lr_rotation=1e-2))
    before = model.rotations.matrices.clone()
    for step in range(6):
        inputs = data(step)
        expected = oracle.gradients(inputs, functools.partial(losses_of, inputs=inputs))
        optimizer.zero_grad()
        total(model, losses_of(model(inputs), inputs)).backward()
        close(model, expected)
        optimizer.step()
        assert not model.rotations.tangents.any()
        assert model.completed_steps == step + 1
    assert (model.rotations.matrices - before).abs().max() > 0.01
    assert model.rotations.orthogonality_error() < 1e-14


@pytest.mark.parametrize("kind", KINDS)
def test_that_an_absent_task_takes_no_part(kind: type[RotateOnly]) -> None:
    model = build(kind, burn_in_period=2)
    oracle = Oracle(model)
    optimizer = torch.optim.SGD(model.param_groups(lr=1e-2, lr_rotation=1e-2))
    for step in range(5):
        inputs, absent = data(step), (0, 2, 1)[step % 3]

        def losses(
            predictions: Sequence[Tensor], inputs: Tensor = inputs, absent: int = absent
        ) -> list[Tensor | None]:
            given = losses_of(predictions, inputs)
            return [None if k == absent else loss for k, loss in enumerate(given)]

        expected = oracle.gradients(inputs, losses)
        optimizer.zero_grad()
        model.backward(losses(model(inputs)))
        close(model, expected)
        assert not model.rotations.tangents.grad[absent].any()
        optimizer.step()


def test_that_a_sum_of_losses_suffices() -> None:
    model, twin = build(RotoGrad), build(RotoGrad)
    total(model, losses_of(model(data(0)), data(0))).backward()
    torch.stack(losses_of(twin(data(0)), data(0))).sum().backward()
    close(twin, gradients_of(model), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_that_the_identity_leaves_outputs_as_they_were(dtype: torch.dtype) -> None:
    model = build(RotoGrad, init="identity", dtype=dtype)
    plain = VanillaMTL(model.backbone, model.heads)
    for mode in (True, False):
        model.train(mode)
        outputs = zip(model(data(0, dtype=dtype)), plain(data(0, dtype=dtype)), strict=True)
        assert all(torch.equal(one, other) for one, other in outputs)


def test_that_normalised_losses_are_divided_by_their_first() -> None:
    model = build(RotateOnly, normalize_losses=True, burn_in_period=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    first = [torch.zeros(())] * 3
    for step in range(4):
        optimizer.zero_grad()
        losses = losses_of(model(data(step)), data(step))
        if step in (0, 2):
            first = [loss.detach() for loss in losses]
        loss = model.total(losses)
        expected = sum(a / b for a, b in zip(losses, first, strict=True))
        torch.testing.assert_close(loss, expected)
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(4, SIZE), (4, 2, SIZE), (4, 2, 3), (4, 3, 1, 2)])
def test_any_shape_of_features(shape: tuple[int, ...]) -> None:
    class Shaped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = torch.nn.Parameter(torch.randn(*shape))

        def forward(self) -> tuple[Tensor, str]:
            return self.features, "extra"

    torch.manual_seed(0)
    model = RotoGrad(Shaped(), [torch.nn.Identity()] * 2, SIZE, init="random")
    predictions, extras = model()
    assert extras == ["extra"]
    features: Any = model.backbone.features
    flat = features.reshape(-1, SIZE)
    for matrix, prediction in zip(model.rotations.matrices, predictions, strict=True):
        assert prediction.shape == shape
        torch.testing.assert_close(prediction.reshape(-1, SIZE), flat @ matrix.T)
    sum(one.square().mean() for one in predictions).backward()
    assert features.grad.abs().min() > 0


def test_that_batch_size_does_not_change_the_size_of_gradients() -> None:
    norms = []
    for copies in (1, 16):
        model = build(RotoGrad)
        inputs = data(0).repeat(copies, 1)
        model.backward(losses_of(model(inputs), inputs))
        norms.append(model.rotations.tangents.grad)
    torch.testing.assert_close(*norms)
