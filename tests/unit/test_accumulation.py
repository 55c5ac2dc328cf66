"""Sums over an accumulation window on a real Accelerator, in one process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.unit.jobs import build_accelerator, reset
from toolkit.bridge.accumulation import Window, WindowAccumulator, scale_grads_
from toolkit.bridge.control import ControlGroup
from toolkit.bridge.rescaling import LossReduction

pytestmark = pytest.mark.usefixtures("fresh_state")


class Job:
    """A small job with what the bridge puts into its loop."""

    def __init__(
        self,
        reduction: LossReduction = "mean",
        dtype: torch.dtype = torch.float64,
        init_scale: float | None = None,
        accumulation: int = 1,
    ) -> None:
        torch.manual_seed(0)
        self.reduction: LossReduction = reduction
        self.dtype = dtype
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
        self.accelerator = accelerator = build_accelerator(accumulation, init_scale)
        self.model: nn.Module = accelerator.prepare(model)
        accelerator.native_amp = init_scale is not None
        self.optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
        control = ControlGroup(accelerator)
        self.accumulator = WindowAccumulator(accelerator, self.model, control, reduction)

    def batches(self, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        return [
            (
                torch.randn(size, 5, generator=generator, dtype=torch.float64).to(self.dtype),
                torch.randint(3, (size,), generator=generator),
            )
            for size in sizes
        ]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        features, labels = batch
        total = F.cross_entropy(self.model(features), labels, reduction="sum")
        return total / max(len(labels), 1) if self.reduction == "mean" else total

    def window(self, sizes: list[int], as_tensor: bool = False) -> Window:
        return self.window_of(self.batches(sizes), as_tensor)

    def window_of(self, batches: list[tuple[Tensor, Tensor]], as_tensor: bool = False) -> Window:
        for number, batch in enumerate(batches, start=1):
            num_samples: Any = len(batch[1])
            with self.accelerator.accumulate(self.model):
                # Windows of any length, as at the end of a dataloader.
                self.accelerator.gradient_state._set_sync_gradients(number == len(batches))
                self.accumulator.backward(
                    self.loss(batch), torch.tensor(num_samples) if as_tensor else num_samples
                )
        return self.accumulator.close()

    def sums(self, window: Window) -> list[Tensor]:
        grads = [parameter.grad for parameter in self.model.parameters()]
        return [grad * (window.sum_factor / window.scale) for grad in grads if grad is not None]

    def expected(self, sizes: list[int]) -> tuple[list[Tensor], float]:
        """The gradient of the summed loss over all of the window at once, and the loss."""
        batches = self.batches(sizes)
        features, labels = (torch.cat([batch[part] for batch in batches]) for part in (0, 1))
        total = F.cross_entropy(self.model(features), labels, reduction="sum")
        return list(torch.autograd.grad(total, list(self.model.parameters()))), float(
            total.detach()
        )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("accumulation", [1, 3, 4])
@pytest.mark.parametrize("sizes", [[6], [4, 9, 1], [7, 2], [1, 0, 5]], ids=str)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_that_the_sum_over_an_uneven_window_is_exact(
    reduction: LossReduction, accumulation: int, sizes: list[int], as_tensor: bool
) -> None:
    job = Job(reduction, accumulation=accumulation)
    expected, loss = job.expected(sizes)

    window = job.window(sizes, as_tensor)

    assert window.count == sum(sizes)
    assert window.loss == pytest.approx(loss / sum(sizes), rel=1e-12)
    assert window.sum_factor == accumulation
    assert window.scale == 1.0
    torch.testing.assert_close(job.sums(window), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("init_scale", [2.0**16, 2.0**6])
@pytest.mark.parametrize("sizes", [[6], [4, 9], [0, 3], [600]], ids=str)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_that_a_loss_scaler_leaves_the_sum_exact(
    init_scale: float, sizes: list[int], accumulation: int
) -> None:
    plain = Job("sum", torch.float32, accumulation=accumulation)
    expected = plain.sums(plain.window(sizes))
    reset()
    job = Job("sum", torch.float32, init_scale, accumulation)

    window = job.window(sizes)

    assert window.scale == init_scale
    assert math.log2(window.sum_factor / accumulation) == round(math.log2(max(sizes[0], 1)))
    grads = [parameter.grad for parameter in job.model.parameters()]
    scaled = [grad for grad in grads if grad is not None]
    assert not torch.equal(scaled[0], expected[0]), "the scaler was not at work"
    # Every factor is a power of two, so that not one bit is lost.
    torch.testing.assert_close(job.sums(window), expected, rtol=0, atol=0)


def test_that_a_scaled_sum_of_many_samples_does_not_overflow() -> None:
    job = Job("sum", torch.float32, init_scale=2.0**16)
    batch = job.batches([1])[0]
    loss = job.loss(batch) * 1e33 * 2**10  # the sum over 2^10 samples, each of a loss near 1e33

    job.accumulator.backward(loss, 2**10)

    window = job.accumulator.close()
    assert all(bool(torch.isfinite(grad).all()) for grad in job.sums(window))
    assert math.isfinite(window.loss)


def test_that_the_constant_stays_from_window_to_window() -> None:
    job = Job("sum", torch.float32, init_scale=2.0**10)
    first = job.window([16])
    job.optimizer.zero_grad()
    expected, _ = job.expected([2])

    second = job.window([2])

    assert first.sum_factor == second.sum_factor == 16
    torch.testing.assert_close(job.sums(second), expected)


def test_that_a_window_forgets_the_one_before() -> None:
    job = Job(accumulation=2)
    job.window([5, 6])
    job.optimizer.zero_grad()
    expected, loss = job.expected([3, 4])

    window = job.window([3, 4])

    assert window.count == 7
    assert window.loss == pytest.approx(loss / 7)
    torch.testing.assert_close(job.sums(window), expected)


def test_when_a_window_is_open() -> None:
    job = Job(accumulation=2)
    assert not job.accumulator.is_open
    for batch in job.batches([2, 3]):
        with job.accelerator.accumulate(job.model):
            job.accumulator.backward(job.loss(batch), len(batch[1]))
        assert job.accumulator.is_open
    job.accumulator.close()
    assert not job.accumulator.is_open


def test_that_a_window_without_samples_has_no_loss() -> None:
    job = Job()

    window = job.window([0])

    assert window.count == 0
    assert math.isnan(window.loss)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in job.sums(window))


def test_that_counts_may_be_weights() -> None:
    job = Job("mean")
    batch = job.batches([4])[0]
    job.accumulator.backward(job.loss(batch), torch.tensor([2.5]))

    assert job.accumulator.close().count == 2.5


def test_that_closing_without_backward_is_refused() -> None:
    job = Job()
    with pytest.raises(RuntimeError, match=r"in place of accelerator.backward\(\)"):
        job.accumulator.close()
    job.window([2])
    with pytest.raises(RuntimeError, match="no backward"):
        job.accumulator.close()


@pytest.mark.parametrize("count", [-1, math.nan, math.inf, torch.tensor(-2.0)])
def test_that_an_impossible_count_is_refused_before_anything_happens(count: float) -> None:
    job = Job()
    with pytest.raises(ValueError, match="num_samples must be finite and not negative"):
        job.accumulator.backward(job.loss(job.batches([2])[0]), count)

    assert not job.accumulator.is_open
    assert all(parameter.grad is None for parameter in job.model.parameters())


def test_that_a_loss_per_sample_is_refused() -> None:
    job = Job()
    features, labels = job.batches([3])[0]
    losses = F.cross_entropy(job.model(features), labels, reduction="none")

    with pytest.raises(ValueError, match=r"loss must be a scalar, got shape \(3,\)"):
        job.accumulator.backward(losses, 3)


def test_that_a_sum_of_half_precision_losses_does_not_overflow() -> None:
    # a mean loss in float16 is multiplied by the count before it is divided by the constant
    # (and before it is made float64): 3.0 x 40,000 is inf, and a donor would publish only skips.
    job = Job("mean", torch.float32, init_scale=1.0)
    loss = (next(job.model.parameters()).sum() * 0 + 3.0).half()

    job.accumulator.backward(loss, 40_000)

    assert job.accumulator.close().loss == 3.0


def test_that_one_process_has_nothing_to_reduce() -> None:
    job = Job()
    job.window([3])
    before = [p.grad.clone() for p in job.model.parameters() if p.grad is not None]
    job.accumulator.reduce_unmanaged_(job.model.named_parameters())

    assert len(before) == 4
    torch.testing.assert_close([p.grad for p in job.model.parameters()], before, rtol=0, atol=0)


def test_that_gradients_that_exist_are_scaled_in_place() -> None:
    with_grad, without = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    grad = with_grad.grad = torch.full((2,), 3.0)

    scale_grads_([with_grad, without], 0.5)
    scale_grads_([without], 0.5)
    scale_grads_([], 0.5)

    assert with_grad.grad is grad
    assert grad.tolist() == [1.5, 1.5]
    assert without.grad is None
