"""Freezing under Accelerate on one process: windows, wrappers, loss scalers, checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tests.frozen_cases import (
    OPTIMIZERS,
    REST,
    Net,
    batches,
    build_net,
    differences,
    snapshot,
    squared_error,
)
from tests.unit.jobs import build_accelerator, reset
from toolkit.freezing import Freezing, freeze, frozen, has_gradients, unfreeze

pytestmark = pytest.mark.usefixtures("fresh_state")

RECIPE = OPTIMIZERS["adamw-loop"]


class Job:
    """A prepared model and its prepared optimizers.

    Args:
        accumulation: micro-batches of a window.
        init_scale: begin with a loss scaler of this scale; None for none.
        apart: an optimizer for the resting layer alone.
        without: the optimizer has never heard of the resting layer, which never trains.
    """

    def __init__(
        self,
        accumulation: int = 1,
        init_scale: float | None = None,
        apart: bool = False,
        without: bool = False,
    ) -> None:
        reset()
        self.accelerator = accelerator = build_accelerator(accumulation, init_scale)
        self.net: Net = build_net().float()
        layer = self.net.get_submodule(REST)
        others = [self.net.hidden_task1.weight, self.net.output.weight]
        if without:
            layer.requires_grad_(False).register_forward_pre_hook(lambda part, args: _rest(part))
        groups = [others, list(layer.parameters())] if apart else [list(self.net.parameters())]
        self.model: nn.Module = accelerator.prepare(self.net)
        accelerator.native_amp = init_scale is not None
        self.optimizers: list[Any] = [
            accelerator.prepare(RECIPE(params)) for params in ([others] if without else groups)
        ]
        self.norms: list[Tensor] = []

    def train(self, num_batches: int, seed: int = 0, max_norm: float = 0.1) -> None:
        """The loop of Accelerate's documentation."""
        for first, second, wanted in batches(num_batches, seed=seed):
            with self.accelerator.accumulate(self.model):
                self.model.train()
                outputs = self.model(first.float(), second.float())
                self.accelerator.backward(squared_error(outputs, wanted.float()))
                if self.accelerator.sync_gradients:
                    parameters = self.model.parameters()
                    self.norms.append(self.accelerator.clip_grad_norm_(parameters, max_norm))
                for optimizer in self.optimizers:
                    if has_gradients(optimizer):
                        optimizer.step()
                    optimizer.zero_grad(set_to_none=False)

    def rest(self, **options: Any) -> Freezing:
        return freeze(self.model, REST, optimizer=self.optimizers, **options)

    def snapshot(self, part: str = "") -> dict[str, Any]:
        """Copies of all tensors; of the resting layer, or of the "others"."""
        merged: dict[str, Any] = {}
        for optimizer in self.optimizers:
            merged |= snapshot(self.net, optimizer.optimizer)
        if not part:
            return merged
        return {name: value for name, value in merged.items() if (REST in name) == (part == REST)}


def _rest(module: nn.Module) -> None:
    module.eval()


@pytest.mark.parametrize("requires_grad", [True, False], ids=["graph kept", "saving compute"])
@pytest.mark.parametrize("apart", [False, True], ids=["one optimizer", "two optimizers"])
@pytest.mark.parametrize("init_scale", [None, 8.0], ids=["no scaler", "scaler"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_others_train_as_if_alone(
    accumulation: int, init_scale: float | None, apart: bool, requires_grad: bool
) -> None:
    alone = Job(accumulation, init_scale, without=True)
    alone.train(2 * accumulation)
    job = Job(accumulation, init_scale, apart)
    before = job.snapshot(REST)
    freezing = job.rest(requires_grad=requires_grad)
    job.train(2 * accumulation)
    assert differences(before, job.snapshot(REST)) == []
    assert differences(alone.snapshot("others"), job.snapshot("others")) == []
    assert len(job.norms) == 2
    assert all(torch.equal(*pair) for pair in zip(job.norms, alone.norms, strict=True))
    unfreeze(freezing)
    job.train(accumulation)
    assert differences(before, job.snapshot(REST)) != []


@pytest.mark.parametrize("num_batches", [2, 3], ids=["at its end", "in the middle"])
def test_freezing_in_a_window(num_batches: int) -> None:
    # zero_grad() of Accelerate does nothing before the end of a window.
    job = Job(accumulation=2)
    job.train(num_batches)
    before = job.snapshot(REST)
    grad = copy.deepcopy(job.net.output.weight.grad)
    assert grad is not None
    assert bool(grad.any()) == (num_batches == 3)
    job.rest()
    assert differences({"": grad}, {"": job.net.output.weight.grad}) == []
    output = job.net.output.weight.detach().clone()
    job.train(4 - num_batches, seed=1)
    assert differences(before, job.snapshot(REST)) == []
    assert not torch.equal(output, job.net.output.weight)


def poison(parameter: Tensor) -> Any:
    return parameter.register_hook(lambda grad: grad * float("inf"))


def test_an_overflow_in_the_frozen_part_skips_no_step() -> None:
    job, twin = Job(init_scale=8.0), Job(init_scale=8.0)
    for each in (job, twin):
        each.rest()
    handle = poison(job.net.get_parameter(f"{REST}.0.weight"))
    for each in (job, twin):
        each.train(2)
    assert differences(twin.snapshot(), job.snapshot()) == []
    assert job.accelerator.scaler.get_scale() == 8.0
    assert not job.optimizers[0].step_was_skipped
    handle.remove()

    before = job.snapshot()
    poison(job.net.output.weight)
    job.train(1)
    assert differences(before, job.snapshot()) == []
    assert job.optimizers[0].step_was_skipped
    assert job.accelerator.scaler.get_scale() == 4.0


def test_all_of_an_optimizer_is_frozen() -> None:
    job = Job(init_scale=8.0, apart=True)
    others, own = job.optimizers
    with frozen(job.model, REST, optimizer=own):
        before = job.snapshot()
        outputs = job.model(*(each.float() for each in next(batches(1, seed=0))[:2]))
        job.accelerator.backward(outputs.sum())
        assert (has_gradients(others), has_gradients(own)) == (True, False)
        with pytest.raises(AssertionError, match="No inf checks were recorded"):
            own.step()
        others.step()
    assert differences(before, job.snapshot()) != []
    assert has_gradients(others)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_of_ones_own(fused: bool) -> None:
    ends = []
    for with_scaler in (True, False):
        net = build_net().float()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=with_scaler)
        freeze(net, REST, optimizer=optimizer)
        if with_scaler:
            poison(net.get_parameter(f"{REST}.0.weight"))
        for first, second, wanted in batches(3, seed=0):
            optimizer.zero_grad(set_to_none=False)
            scaler.scale(squared_error(net(first.float(), second.float()), wanted)).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        ends.append({**snapshot(net, optimizer), "norm": norm})
    assert scaler.get_scale() == 1.0
    assert differences(*ends) == []


@pytest.mark.parametrize("frozen_when_saved", [True, False])
def test_a_checkpoint_knows_whether_the_part_is_frozen(
    frozen_when_saved: bool, tmp_path: Path
) -> None:
    job = Job()
    job.train(2)
    freezing = job.rest()
    job.accelerator.register_for_checkpointing(freezing)
    job.train(2, seed=1)
    if not frozen_when_saved:
        unfreeze(freezing)
    job.accelerator.save_state(str(tmp_path))
    saved = job.snapshot()
    job.train(2, seed=2)
    expected = job.snapshot()

    other = Job()  # as after a restart
    other.train(1)
    resumed = other.rest()
    if frozen_when_saved:
        unfreeze(resumed)
    other.accelerator.register_for_checkpointing(resumed)
    other.accelerator.load_state(str(tmp_path))
    assert resumed.is_active == frozen_when_saved
    assert differences(saved, other.snapshot()) == []
    other.train(2, seed=2)
    rested = [name for name in saved if REST in name and name not in differences(saved, expected)]
    assert bool(rested) == frozen_when_saved
    if frozen_when_saved:  # no dropout, so that both have drawn the same numbers
        assert differences(expected, other.snapshot()) == []
    else:
        assert differences(saved, other.snapshot("others")) != []


def test_prepared_after_freezing() -> None:
    net, accelerator = build_net(), Accelerator(cpu=True)
    optimizer = RECIPE(net.parameters())
    with frozen(net, REST, optimizer=optimizer):
        before = copy.deepcopy(net.state_dict())
        model, prepared = accelerator.prepare(net, optimizer)
        for first, second, wanted in batches(2, seed=0):
            accelerator.backward(squared_error(model.train()(first, second), wanted))
            prepared.step()
            prepared.zero_grad()
    after = net.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"hidden_task1.weight", "output.weight"}
