"""RotoGrad in a training run: scalers, accumulation, checkpoints, copies."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from tests.unit.jobs import reset
from tests.unit.rotograd_oracle import build, data, losses_of
from toolkit.rotograd import RotateOnly, RotoGrad, RotoGradNorm, total
from toolkit.rotograd.rotations import pack, unpack

pytestmark = pytest.mark.usefixtures("fresh_state")


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[key].nan_to_num(-1), other[key].nan_to_num(-1)) for key in one)


def adam(model: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.param_groups(lr=1e-2, lr_rotation=5e-3), **options)


@pytest.mark.parametrize("kind", [RotateOnly, RotoGrad, RotoGradNorm])
def test_that_a_loss_scale_is_not_seen(kind: type[RotateOnly]) -> None:
    grads = []
    for scale in (1.0, 65536.0):
        model = build(kind, dtype=torch.float32)
        optimizer = adam(model)
        for step in range(3):
            optimizer.zero_grad()
            inputs = data(step, dtype=torch.float32)
            (scale * model.total(losses_of(model(inputs), inputs))).backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= scale
            optimizer.step()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_that_a_late_task_is_measured_without_the_loss_scale() -> None:
    found = []
    for scales in ((1.0, 1.0, 1.0), (65536.0, 1024.0, 4096.0)):
        model = build(RotoGrad)
        optimizer = adam(model)
        for step, scale in enumerate(scales):
            optimizer.zero_grad()
            losses: list[Tensor | None] = [*losses_of(model(data(step)), data(step))]
            if step == 0:
                losses[1] = None  # has its first norm at the next scale
            (scale * model.total(losses)).backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= scale
            optimizer.step()
        found.append((state(model), model.measures()))
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_that_losses_count_in_the_backward_of_their_total_only() -> None:
    model = build(RotoGradNorm)
    model.total(losses_of(model(data(0)), data(0)))  # a look at the loss
    with pytest.raises(RuntimeError, match="needs the losses' values"):
        torch.stack(losses_of(model(data(0)), data(0))).sum().backward()


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("kind", [RotoGrad, RotoGradNorm])
def test_that_an_overflow_moves_nothing(kind: type[RotateOnly], fused: bool) -> None:
    """A run under a scaler with three overflows is the run without them."""
    results = []
    for scaled in (False, True):
        reset()
        precision = "fp16" if scaled else "no"
        accelerator = Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
        )
        if scaled:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        model = accelerator.prepare(build(kind, dtype=torch.float32, burn_in_period=2))
        accelerator.native_amp = scaled
        optimizer = accelerator.prepare(adam(model, fused=fused))
        for step in range(5):
            for overflow in (True, False) if scaled and step != 3 else (False,):
                before = state(model)
                for part in range(2):
                    inputs = data(10 * step + part, dtype=torch.float32)
                    with accelerator.accumulate(model):
                        losses = losses_of(model(inputs), inputs)
                        if overflow and part == step % 2:
                            losses[1] = losses[1] * torch.inf
                        accelerator.backward(total(model, losses))
                        optimizer.step()
                        optimizer.zero_grad()
                assert same(before, state(model)) == overflow
        assert model.completed_steps == 5
        results.append(state(model))
    assert same(*results)


def test_that_norms_that_are_not_finite_are_not_remembered() -> None:
    model = build(RotoGrad)
    optimizer = torch.optim.SGD(model.heads.parameters(), lr=0.1)
    optimizer.add_param_group({"params": model.rotation_parameters(), "lr": 0.0})
    for factor, steps in ((torch.inf, 0), (1.0, 1)):
        predictions = model(data(0))
        model.backward([factor * loss for loss in losses_of(predictions, data(0))])
        optimizer.zero_grad()
        model.rotations.tangents.grad = torch.zeros_like(model.rotations.tangents)
        optimizer.step()  # by a user who clears gradients that are not finite
        assert model.completed_steps == steps


def test_that_bf16_keeps_rotations_in_float32() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(build(RotoGradNorm, dtype=torch.float32))
    optimizer = accelerator.prepare(adam(model))
    for step in range(4):
        inputs = data(step, dtype=torch.float32)
        accelerator.backward(total(model, losses_of(model(inputs), inputs)))
        assert model.rotations.tangents.grad.dtype == torch.float32
        optimizer.step()
        optimizer.zero_grad()
    assert model.rotations.matrices.dtype == torch.float32
    assert model.rotations.orthogonality_error() < 2e-6
    low = copy.deepcopy(model.module if hasattr(model, "module") else model).to(torch.bfloat16)
    assert low.rotations.matrices.dtype == low.rotations.tangents.dtype == torch.float32
    assert low.backbone[0].weight.dtype == torch.bfloat16
    inputs = data(9, dtype=torch.bfloat16)
    low.backward(losses_of(low(inputs), inputs))
    assert low.backbone[0].weight.grad.isfinite().all()


def test_that_micro_batches_are_no_steps() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = accelerator.prepare(build(RotoGrad, burn_in_period=2))
    optimizer = accelerator.prepare(adam(model))
    for number in range(12):
        with accelerator.accumulate(model):
            before = model.rotations.matrices.clone()
            accelerator.backward(total(model, losses_of(model(data(number)), data(number))))
            optimizer.step()
            optimizer.zero_grad()
        assert model.completed_steps == (number + 1) // 4
        assert torch.equal(before, model.rotations.matrices) == (number % 4 != 3)


@pytest.mark.parametrize("kind", [RotoGrad, RotoGradNorm])
def test_that_a_resumed_run_is_the_same_run(kind: type[RotateOnly], tmp_path: Path) -> None:
    def run(accelerator: Accelerator, model: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            inputs = data(step, dtype=torch.float32)
            accelerator.backward(total(model, losses_of(model(inputs), inputs)))
            optimizer.step()
            optimizer.zero_grad()

    def start() -> tuple[Accelerator, Any, Any]:
        reset()
        accelerator = Accelerator(cpu=True)
        model = build(kind, dtype=torch.float32, burn_in_period=4)
        return accelerator, *accelerator.prepare(model, adam(model))

    accelerator, model, optimizer = start()
    run(accelerator, model, optimizer, range(3))
    model.coop()
    accelerator.save_state(str(tmp_path))
    run(accelerator, model, optimizer, range(3, 8))
    finished = state(model)
    accelerator, resumed, optimizer = start()
    accelerator.load_state(str(tmp_path))
    assert resumed.completed_steps == 3
    run(accelerator, resumed, optimizer, range(3, 8))
    assert same(finished, state(resumed))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_that_a_copy_goes_its_own_way(duplicate: Any) -> None:
    model = build(RotoGradNorm)
    optimizer = adam(model)

    def step(model: Any, optimizer: Any, number: int) -> None:
        optimizer.zero_grad()
        model.backward(losses_of(model(data(number)), data(number)))
        optimizer.step()

    step(model, optimizer, 0)
    twin = duplicate(model)
    before = state(twin)
    step(model, optimizer, 1)
    assert same(before, state(twin))
    assert twin.completed_steps == 1
    other = adam(twin)
    other.load_state_dict(optimizer.state_dict())
    step(twin, other, 1)
    assert twin.completed_steps == 2
    assert not twin.rotations.tangents.any()
    assert not same(before, state(twin))


def test_that_large_steps_leave_rotations() -> None:
    model = build(RotoGrad, dtype=torch.float32)
    optimizer = torch.optim.SGD([model.rotations.tangents], lr=1.0)
    model(data(0, dtype=torch.float32))
    for size in (1e-3, 0.1, 0.4, 1.0, 30.0):
        model.rotations.tangents.grad = pack(size * torch.randn(3, 6, 6))
        before = model.rotations.matrices.clone()
        skew = -unpack(model.rotations.tangents.grad)
        optimizer.step()
        assert model.rotations.orthogonality_error() < 2e-6
        if size < 0.2 or size > 0.9:
            expected = before @ torch.linalg.matrix_exp(skew)
            torch.testing.assert_close(
                model.rotations.matrices, expected, rtol=0, atol=max(size**3 * 5, 1e-5)
            )
    assert model.completed_steps == 0  # no backward, so it was no step of a training
