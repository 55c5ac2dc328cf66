"""Frozen parts in loops of all kinds: what rests, what does not notice, what is restored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from tests.frozen_cases import (
    OPTIMIZERS,
    REST,
    Net,
    batches,
    build_net,
    differences,
    optimizer_without,
    snapshot,
    squared_error,
)
from toolkit.freezing import freeze, frozen, unfreeze

ADAMW = OPTIMIZERS["adamw-foreach"]


def clip(net: Net) -> Tensor:
    return nn.utils.clip_grad_norm_(net.parameters(), 0.1)


def one_backward(net: Net, optimizer: Optimizer, losses: Callable[[], list[Tensor]]) -> Tensor:
    optimizer.zero_grad()
    sum(losses(), torch.zeros(())).backward()
    norm = clip(net)
    optimizer.step()
    return norm


def several_backwards(net: Net, optimizer: Optimizer, losses: Any) -> Tensor:
    for loss in losses():
        loss.backward()
    norm = clip(net)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return norm


def same_graph_twice(net: Net, optimizer: Optimizer, losses: Any) -> Tensor:
    for loss in losses():
        loss.backward(retain_graph=True)
        loss.backward()
    return several_backwards(net, optimizer, list)


def gradient_penalty(net: Net, optimizer: Optimizer, losses: Any) -> Tensor:
    optimizer.zero_grad()
    for loss in losses():
        (grad,) = torch.autograd.grad(loss, net.output.weight, create_graph=True)
        (loss + grad.square().sum()).backward(create_graph=True)
    return several_backwards(net, optimizer, list)


def closure(net: Net, optimizer: Optimizer, losses: Any) -> Tensor:
    norms = []

    def evaluate() -> float:
        optimizer.zero_grad(set_to_none=False)
        loss = sum(losses(), torch.zeros(()))
        loss.backward()
        norms.append(clip(net))
        return loss.item()

    optimizer.step(evaluate)
    return norms[0]


def in_backward(net: Net, optimizer: Optimizer, losses: Any) -> Tensor:
    """The optimizer steps as soon as the gradient of the last parameter is there."""

    def step(parameter: Tensor) -> None:
        optimizer.step()

    handle = net.hidden_task1.weight.register_post_accumulate_grad_hook(step)
    optimizer.zero_grad()
    losses()[0].backward()
    handle.remove()
    return torch.zeros(())


def by_hand(net: Net, optimizer: Optimizer, losses: Any) -> Tensor:
    """Gradients from elsewhere, and an optimizer that is loaded meanwhile."""
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return torch.zeros(())


STEPS: list[Callable[[Net, Optimizer, Any], Tensor]] = [
    one_backward,
    several_backwards,
    same_graph_twice,
    gradient_penalty,
    closure,
    in_backward,
    by_hand,
]


def train(net: Net, optimizer: Optimizer, step: Any = one_backward, recompute: str = "") -> Any:
    """Three steps of three micro-batches. Returns the norms of the gradients."""

    def loss(first: Tensor, second: Tensor, wanted: Tensor) -> Tensor:
        if not recompute:
            return squared_error(net(first, second), wanted)
        layer, reentrant = net.get_submodule(REST), recompute == "reentrant"
        hidden = checkpoint(layer, second.requires_grad_(), use_reentrant=reentrant)
        return squared_error(net.output((net.hidden_task1(first) + hidden).tanh()), wanted)

    norms = []
    for seed in range(3):
        net.train()
        micro_batches = list(batches(3, seed=seed))
        norms.append(step(net, optimizer, lambda data=micro_batches: [loss(*b) for b in data]))
    return norms


def warmed_up() -> tuple[Net, Optimizer]:
    net = build_net()
    optimizer = ADAMW(net.parameters())
    train(net, optimizer)
    optimizer.zero_grad()
    return net, optimizer


@pytest.mark.parametrize("requires_grad", [True, False], ids=["graph kept", "saving compute"])
@pytest.mark.parametrize("recompute", ["", "reentrant", "not reentrant"])
@pytest.mark.parametrize("step", STEPS)
def test_loops(step: Any, recompute: str, requires_grad: bool) -> None:
    if step is gradient_penalty and recompute == "reentrant":
        pytest.skip("torch.autograd.grad and reentrant checkpoints exclude each other")
    net, optimizer = warmed_up()
    expected_net, expected_optimizer = copy.deepcopy((net, optimizer))
    smaller = optimizer_without(ADAMW, expected_optimizer, expected_net)
    layer = expected_net.get_submodule(REST).requires_grad_(False)
    layer.register_forward_pre_hook(lambda module, args: module.eval() and None)
    before = snapshot(net, optimizer)
    expected_norms = train(expected_net, smaller, step, recompute)

    with frozen(net, REST, optimizer=optimizer, requires_grad=requires_grad):
        norms = train(net, optimizer, step, recompute)

    after = snapshot(net, optimizer)
    assert [name for name in differences(before, after) if REST in name] == []
    assert "parameter hidden_task1.weight" in differences(before, after)
    expected = snapshot(expected_net, smaller)
    assert [name for name in differences(expected, after) if REST not in name] == []
    assert all(torch.equal(*pair) for pair in zip(norms, expected_norms, strict=True))


def moved(net: Net, optimizers: list[Optimizer], step: Callable[[], Any]) -> set[str]:
    """The layers of which parameters, buffers or optimizer state change in ``step``."""
    before = [snapshot(net, optimizer) for optimizer in optimizers]
    step()
    changed = set()
    for old, optimizer in zip(before, optimizers, strict=True):
        changed |= {name.split(" ")[-1] for name in differences(old, snapshot(net, optimizer))}
    return {name.partition(".")[0] for name in changed}


def test_several_optimizers() -> None:
    net = build_net()
    own = OPTIMIZERS["momentum-loop"](net.get_submodule(REST).parameters())
    others = ADAMW([net.hidden_task1.weight, net.output.weight])

    def step() -> None:
        squared_error(net(*next(batches(1, seed=3))[:2]), torch.ones(5, 2)).backward()
        for optimizer in (own, others):
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    step()
    with frozen(net, REST, "output", optimizer=[own, others]):
        assert moved(net, [own, others], step) == {"hidden_task1"}
        unused = nn.Parameter(torch.ones(3))
        others.add_param_group({"params": [unused]})
        unused.grad = torch.ones(3)
        assert moved(net, [own, others], step) == {"hidden_task1"}
        assert not torch.equal(unused, torch.ones(3))
    assert moved(net, [own, others], step) == {"hidden_task1", REST, "output"}


@pytest.mark.parametrize("last_in_first_out", [True, False])
def test_nested(last_in_first_out: bool) -> None:
    net, optimizer = warmed_up()

    def step() -> None:
        train(net, optimizer)

    outer = freeze(net, REST, optimizer=optimizer)
    with frozen(net, "hidden_task1", optimizer=optimizer, requires_grad=False) as inner:
        assert moved(net, [optimizer], step) == {"output"}
        if not last_in_first_out:
            unfreeze(outer)
            assert moved(net, [optimizer], step) == {REST, "output"}
            unfreeze(inner)  # which the end of the block then leaves alone
    if last_in_first_out:
        assert moved(net, [optimizer], step) == {"hidden_task1", "output"}
        unfreeze(outer)
    assert moved(net, [optimizer], step) == {"hidden_task1", REST, "output"}
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("requires_grad", [True, False])
def test_one_parameter_of_a_layer(requires_grad: bool) -> None:
    layer: Any = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    optimizer = ADAMW(layer.parameters())
    weight, bias = layer[0].weight.clone(), layer[0].bias.clone()
    with frozen(layer, "0.weight", optimizer=optimizer, requires_grad=requires_grad):
        layer(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
        assert all(module.training for module in layer.modules())
    assert torch.equal(layer[0].weight, weight)
    assert not torch.equal(layer[0].bias, bias)


def test_tied_parameters_rest_together() -> None:
    model: Any = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "decoder": nn.Linear(3, 5)})
    model["decoder"].weight = model["embedding"].weight
    optimizer = ADAMW(model.parameters())
    weight, bias = model["decoder"].weight.clone(), model["decoder"].bias.clone()
    with frozen(model, "embedding", optimizer=optimizer):
        model["decoder"](model["embedding"](torch.arange(5))).square().sum().backward()
        optimizer.step()
    assert torch.equal(model["decoder"].weight, weight)
    assert not torch.equal(model["decoder"].bias, bias)


def test_present_gradients_are_dropped_at_once() -> None:
    net, optimizer = warmed_up()
    squared_error(net(*next(batches(1, seed=4))[:2]), torch.zeros(5, 2).double()).backward()
    with frozen(net, REST, optimizer=optimizer):
        assert net.get_parameter(f"{REST}.0.weight").grad is None
        assert net.output.weight.grad is not None
