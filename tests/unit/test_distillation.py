"""Distillation losses against torch's own and against their definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from toolkit.distillation import Reduction, kl_loss, mse_loss


def outputs(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * 3


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3)], ids=str)
def test_that_the_divergence_is_its_definition(
    temperature: float, reduction: Reduction, shape: tuple[int, ...]
) -> None:
    student, teacher = outputs(*shape), outputs(*shape, seed=1)
    total = 0.0
    for s, t in zip(student.reshape(-1, 3), teacher.reshape(-1, 3), strict=True):
        p, q = (t / temperature).softmax(0), (s / temperature).softmax(0)
        total += float((p * (p / q).log()).sum()) * temperature**2
    expected = total / student[..., 0].numel() if reduction == "mean" else total

    loss = kl_loss(student, teacher, temperature, reduction)

    assert float(loss) == pytest.approx(expected, rel=1e-12)
    assert float(kl_loss(teacher, teacher, temperature, reduction)) == 0.0


def test_that_the_gradient_keeps_its_size_at_high_temperatures() -> None:
    # Hinton et al., equation 4: for large T the gradient is that of the squared difference of
    # centred logits over their number, whatever T is.
    student, teacher = outputs(1, 3).requires_grad_(), outputs(1, 3, seed=1)
    (grad,) = torch.autograd.grad(kl_loss(student, teacher, 1e6), student)
    centred = [x - x.mean() for x in (student.detach(), teacher)]
    torch.testing.assert_close(grad, (centred[0] - centred[1]) / 3, rtol=0, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_that_two_teachers_are_one_that_predicts_their_mean(temperature: float) -> None:
    student = outputs(4, 3).requires_grad_()
    teachers = [outputs(4, 3, seed=seed) for seed in (1, 2)]
    both = sum((kl_loss(student, t, temperature) for t in teachers), torch.zeros(())) / 2
    (mean_of_losses,) = torch.autograd.grad(both, student)
    mean = torch.stack([(t / temperature).softmax(1) for t in teachers]).mean(0)
    loss_of_mean = kl_loss(student, temperature * mean.log(), temperature)
    (expected,) = torch.autograd.grad(loss_of_mean, student)
    torch.testing.assert_close(mean_of_losses, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 1)], ids=str)
def test_that_the_squared_difference_is_torchs(shape: tuple[int, ...]) -> None:
    student, teacher = outputs(*shape), outputs(*shape, seed=1)
    expected = F.mse_loss(student, teacher)
    torch.testing.assert_close(mse_loss(student, teacher), expected)
    torch.testing.assert_close(
        mse_loss(student, teacher, "sum"), expected * student[..., 0].numel()
    )


@pytest.mark.parametrize("loss_fn", [kl_loss, mse_loss])
def test_what_both_have_in_common(loss_fn: object) -> None:
    assert callable(loss_fn)
    student, teacher = outputs(4, 3).requires_grad_(), outputs(4, 3, seed=1).requires_grad_()
    loss_fn(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None
    empty = loss_fn(student[:0], teacher[:0])
    assert empty.item() == 0.0
    assert empty.requires_grad
    assert loss_fn(student.half(), teacher.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"student gives \(4, 3\), the teacher \(4, 2\)"):
        loss_fn(student, teacher[:, :2])
    with pytest.raises(ValueError, match=r"got shape \(4,\); add a dimension"):
        loss_fn(student[:, 0], teacher[:, 0])


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_that_a_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        kl_loss(outputs(2, 3), outputs(2, 3), temperature)
