"""Frozen layers rest bit by bit under every optimizer, and the others do not notice."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from tests.frozen_cases import (
    OPTIMIZERS,
    REST,
    Net,
    Recipe,
    batches,
    build_net,
    differences,
    optimizer_without,
    snapshot,
    squared_error,
)
from toolkit.freezing import freeze, frozen, unfreeze

WARM_UP, STEPS = 3, 3
# How the resting layer stands to the loss of the other: in its graph or not; and whether the
# gradients of a task are zeroed by all steps, or only by the steps of that task.
SITUATIONS = ("used", "unused", "stale")

each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def zero_gradients(net: Net, optimizer: Optimizer, situation: str, set_to_none: bool) -> None:
    if situation != "stale":
        optimizer.zero_grad(set_to_none=set_to_none)
        return
    for name, parameter in net.named_parameters():
        if not name.startswith(REST) and parameter.grad is not None:
            parameter.grad = None if set_to_none else torch.zeros_like(parameter)


def train(
    net: Net, optimizer: Optimizer, situation: str = "used", set_to_none: bool = True
) -> None:
    """Some steps with clipping, in the mode that the user would choose."""
    for first, second, wanted in batches(STEPS, seed=2):
        zero_gradients(net, optimizer, situation, set_to_none)
        net.train()
        outputs = net(first, second if situation == "used" else None)
        squared_error(outputs, wanted).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()


def warmed_up(recipe: Recipe) -> tuple[Net, Optimizer]:
    """A model with moments everywhere, and with the gradients of its last step."""
    net = build_net()
    optimizer = recipe(net.parameters())
    for first, second, wanted in batches(WARM_UP, seed=1):
        optimizer.zero_grad()
        squared_error(net(first, second), wanted).backward()
        optimizer.step()
    return net, optimizer


def without_the_layer(
    recipe: Recipe, net: Net, optimizer: Optimizer, situation: str
) -> dict[str, Any]:
    """What the same training makes of the others where the optimizer never held the layer."""
    net, optimizer = copy.deepcopy((net, optimizer))
    smaller = optimizer_without(recipe, optimizer, net)
    for parameter in net.get_submodule(REST).parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    for first, second, wanted in batches(STEPS, seed=2):
        smaller.zero_grad()
        net.get_submodule(REST).eval()
        outputs = net(first, second if situation == "used" else None)
        squared_error(outputs, wanted).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        smaller.step()
    return snapshot(net, smaller)


@pytest.mark.parametrize("requires_grad", [True, False], ids=["graph kept", "saving compute"])
@pytest.mark.parametrize("set_to_none", [True, False], ids=["to None", "to zero"])
@pytest.mark.parametrize("situation", SITUATIONS)
@each_optimizer
def test_truth_table(name: str, situation: str, set_to_none: bool, requires_grad: bool) -> None:
    recipe = OPTIMIZERS[name]
    net, optimizer = warmed_up(recipe)
    before = snapshot(net, optimizer)
    resting = {key: value for key, value in before.items() if REST in key}
    expected = without_the_layer(recipe, net, optimizer, situation)

    with frozen(net, REST, optimizer=optimizer, requires_grad=requires_grad):
        train(net, optimizer, situation, set_to_none)

    after = snapshot(net, optimizer)
    others = {key: value for key, value in after.items() if REST not in key}
    assert differences(resting, {key: after[key] for key in after if REST in key}) == []
    assert differences({key: expected[key] for key in expected if REST not in key}, others) == []
    assert [key for key in differences(before, after) if key.startswith("parameter")] == [
        "parameter hidden_task1.weight",
        "parameter output.weight",
    ]


@contextlib.contextmanager
def naively(net: Net, optimizer: Optimizer, how: str) -> Iterator[None]:
    """What people do in place of freezing."""
    layer = net.get_submodule(REST)
    weight: nn.Parameter = net.get_parameter(f"{REST}.0.weight")
    handles: list[Any] = []
    if "requires_grad" in how:
        layer.requires_grad_(False)
    if "eval" in how:
        handles.append(layer.register_forward_pre_hook(lambda module, args: layer.eval() and None))
    if "lr" in how:
        optimizer.param_groups[1]["lr"] = 0.0
    if "zero" in how:
        handles.append(weight.register_hook(torch.zeros_like))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("how", "situation", "set_to_none", "moved"),
    [
        ("requires_grad, eval", "unused", False, "parameter hidden_task2.0.weight"),
        ("requires_grad, eval", "stale", True, "parameter hidden_task2.0.weight"),
        ("requires_grad", "used", True, "buffer hidden_task2.1.running_mean"),
        ("eval", "used", True, "parameter hidden_task2.0.weight"),
        ("zero, eval", "used", True, "parameter hidden_task2.0.weight"),
        ("lr, eval", "used", True, "state exp_avg of hidden_task2.0.weight"),
    ],
)
def test_naive_ways_move_the_layer(how: str, situation: str, set_to_none: bool, moved: str) -> None:
    net = build_net()
    groups: list[dict[str, Any]] = [
        {"params": [net.hidden_task1.weight, net.output.weight]},
        {"params": net.hidden_task2.parameters()},
    ]
    optimizer = torch.optim.Adam(groups, lr=0.1)
    for first, second, wanted in batches(WARM_UP, seed=1):
        optimizer.zero_grad(set_to_none=set_to_none)
        squared_error(net(first, second), wanted).backward()
        optimizer.step()
    if not set_to_none:
        optimizer.zero_grad(set_to_none=False)
    before = snapshot(net, optimizer, REST)

    with naively(net, optimizer, how):
        train(net, optimizer, situation, set_to_none)

    assert moved in differences(before, snapshot(net, optimizer, REST))


class Article(nn.Module):
    """Two input types with their own first layer over one output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_task1 = nn.Linear(3, 3, bias=False)
        self.hidden_task2 = nn.Linear(2, 3, bias=False)
        self.output = nn.Linear(3, 1, bias=False)

    def forward(self, features: torch.Tensor, task: int) -> torch.Tensor:
        hidden = self.get_submodule(f"hidden_task{task}")(features)
        outputs: torch.Tensor = self.output(torch.sigmoid(hidden))
        return outputs


@pytest.mark.parametrize("name", ["momentum-loop", "momentum-fused", "adagrad-loop"])
def test_a_layer_that_has_never_trained_before(name: str) -> None:
    # Fused SGD raises a TypeError where some parameters have momentum and others do not.
    ends = []
    for layer_rests_first in (True, False):
        net = build_net()
        recipe = OPTIMIZERS[name]
        optimizer = recipe(net.parameters())
        if layer_rests_first:
            with frozen(net, REST, optimizer=optimizer):
                train(net, optimizer)
        weight = net.get_parameter(f"{REST}.0.weight")
        before = weight.detach().clone()
        torch.manual_seed(3)
        weight.grad = torch.ones_like(weight)
        net.hidden_task1.weight.grad = torch.ones_like(net.hidden_task1.weight)
        optimizer.step()
        ends.append(weight - before)
    assert torch.equal(*ends)


@pytest.mark.parametrize("set_to_none", [True, False], ids=["to None", "to zero"])
def test_the_case_of_the_article(set_to_none: bool) -> None:
    torch.manual_seed(0)
    model = Article()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.9)
    inputs = {1: torch.randn(4, 3), 2: torch.randn(4, 2)}
    wanted = torch.randn(4, 1)

    def changed_by(task: int) -> set[str]:
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        with frozen(model, f"hidden_task{3 - task}", optimizer=optimizer):
            optimizer.zero_grad(set_to_none=set_to_none)
            squared_error(model(inputs[task], task), wanted).backward()
            optimizer.step()
        return {name for name in before if not torch.equal(before[name], model.get_parameter(name))}

    assert changed_by(1) == {"hidden_task1.weight", "output.weight"}
    assert model.hidden_task2.weight not in optimizer.state
    assert changed_by(2) == {"hidden_task2.weight", "output.weight"}
    assert int(optimizer.state[model.hidden_task1.weight]["step"]) == 1
    assert int(optimizer.state[model.hidden_task2.weight]["step"]) == 1
    assert int(optimizer.state[model.output.weight]["step"]) == 2


@each_optimizer
def test_unfreezing_goes_on_or_begins_anew(name: str) -> None:
    recipe = OPTIMIZERS[name]
    ends = {}
    for reset_state in (False, True):
        net, optimizer = warmed_up(recipe)
        expected_net, expected_optimizer = copy.deepcopy((net, optimizer))
        freezing = freeze(net, REST, optimizer=optimizer)
        unfreeze(freezing, reset_state=reset_state)
        if reset_state:  # a new optimizer for the layer, the old one for the others
            weight = expected_net.get_parameter(f"{REST}.0.weight")
            fresh = recipe([weight]).state.get(weight, {})
            if name in ("momentum-fused", "nesterov-fused"):  # which need a momentum of all or none
                fresh = {"momentum_buffer": torch.zeros_like(weight.detach())}
            expected_optimizer.state.pop(weight, None)
            if fresh:
                expected_optimizer.state[weight] = fresh
        torch.manual_seed(3)  # of the dropout
        train(net, optimizer)
        torch.manual_seed(3)
        train(expected_net, expected_optimizer)
        ends[reset_state] = snapshot(net, optimizer)
        assert differences(snapshot(expected_net, expected_optimizer), ends[reset_state]) == []
    has_moments = name.partition("-")[0] != "sgd"
    assert bool(differences(ends[False], ends[True])) == has_moments
