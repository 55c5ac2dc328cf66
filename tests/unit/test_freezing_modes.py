"""Modes, flags and buffers of frozen modules while they rest, and what is restored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from toolkit.freezing import freeze, frozen, unfreeze


class Model(nn.Module):
    """A layer with a norm and a dropout of its own, under an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.output = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, features: Tensor) -> Tensor:
        """(N, 3) to (N, 4)."""
        outputs: Tensor = self.output(self.layer(features))
        return outputs


class CallsForward(Model):
    """Goes around the hooks of its layers."""

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.layer[1].forward(self.layer[0].forward(features))
        return self.output.forward(self.layer[2].forward(hidden))


class Spectral(Model):
    """Whose layer has a hook of its own that looks at the mode."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.spectral_norm(self.layer[0])


def in_place(model: Model) -> Model:
    model.compile(backend="eager")
    return model


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


def step(called: Any, optimizer: torch.optim.Optimizer) -> None:
    called.train()
    optimizer.zero_grad()
    called(torch.arange(15.0).reshape(5, 3).sin()).square().sum().backward()
    optimizer.step()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.1)


@pytest.mark.parametrize("trained_before", [True, False])
@pytest.mark.parametrize(
    ("build", "wrap"),
    [
        (Model, lambda model: model),
        (CallsForward, lambda model: model),
        (Spectral, lambda model: model),
        (Model, lambda model: torch.compile(model, backend="eager")),
        (Model, lambda model: torch.compile(model, backend="eager", fullgraph=True)),
        (Model, in_place),
    ],
    ids=["plain", "forward", "spectral norm", "compiled", "compiled whole", "compiled in place"],
)
def test_buffers_rest_whatever_train_says(
    build: Callable[[], Model], wrap: Callable[[Model], Any], trained_before: bool
) -> None:
    model = build()
    called, optimizer = wrap(model), adam(model)
    if trained_before:
        step(called, optimizer)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def still() -> set[str]:
        after = model.state_dict()
        return {name for name in tensors if torch.equal(tensors[name], after[name])}

    with frozen(called, "layer", optimizer=optimizer):
        for _ in range(3):
            step(called, optimizer)
    assert still() == {name for name in tensors if name.startswith("layer")}
    step(called, optimizer)
    assert not still() & {"layer.1.running_mean", "layer.1.weight"}


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("targets", [["layer"], ["layer", "output.1"], ["*"]], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_modes_are_restored(training: bool, targets: list[str]) -> None:
    model = Model().train(training)
    model.layer[1].train(not training)  # by the user's will
    before = modes(model)
    freezing = freeze(model, *targets, optimizer=adam(model))
    assert not any(module.training for module in model.layer.modules())
    assert model.output[0].training == (training and targets != ["*"])
    unfreeze(freezing)
    assert modes(model) == before


def test_modes_follow_the_model_where_it_has_changed() -> None:
    model: Any = Model()
    freezing = freeze(model, "layer", optimizer=adam(model))
    model.eval()
    unfreeze(freezing)
    assert not any(modes(model).values())


@pytest.mark.parametrize("wrap", [lambda model: model, lambda m: torch.compile(m, backend="eager")])
def test_the_model_itself_as_target(wrap: Callable[[Model], Any]) -> None:
    model: Any = Model()
    called, optimizer = wrap(model), adam(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with frozen(called, called, optimizer=optimizer) as freezing:
        assert freezing.names == [name for name, _ in model.named_parameters()]
        step(called, optimizer)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(modes(model).values())


@pytest.mark.parametrize("requires_grad", [True, False])
def test_requires_grad_is_restored_as_the_user_left_it(requires_grad: bool) -> None:
    model: Any = Model()
    model.layer[0].bias.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    with frozen(model, "layer", optimizer=optimizer, requires_grad=requires_grad) as freezing:
        assert "layer.0.bias" in freezing.names
        assert model.layer[0].weight.requires_grad == requires_grad
        if requires_grad:
            model.layer[1].bias.requires_grad_(False)
    off = {name for name, param in model.named_parameters() if not param.requires_grad}
    assert off == {"layer.0.bias"} | ({"layer.1.bias"} if requires_grad else set())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_an_exception_ends_the_freezing(error: type[BaseException], requires_grad: bool) -> None:
    model: Any = Model()
    optimizer = adam(model)
    step(model, optimizer)
    state = optimizer.state[model.layer[0].weight]
    options: dict[str, Any] = {"requires_grad": requires_grad, "reset_state": True}
    freezings = []

    def fail() -> None:
        with frozen(model, "layer", optimizer=optimizer, **options) as freezing:
            freezings.append(freezing)
            step(model, optimizer)
            raise error("from the block")

    with pytest.raises(error, match="from the block"):
        fail()
    assert not freezings[0].is_active
    assert all(modes(model).values())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.layer.parameters())
    assert not optimizer._optimizer_step_pre_hooks
    assert optimizer.state[model.layer[0].weight] is state
    before = model.layer[0].weight.clone()
    step(model, optimizer)
    assert not torch.equal(before, model.layer[0].weight)


def test_a_backward_that_fails() -> None:
    model: Any = Model()
    optimizer = adam(model)
    before = model.output[0].weight.clone()
    with frozen(model, "output", optimizer=optimizer):
        features = torch.randn(5, 3)
        hidden = model.layer(features)
        hidden.register_hook(lambda grad: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            model.output(hidden).sum().backward()
        model(features).sum().backward()
        assert all(parameter.grad is None for parameter in model.output.parameters())
        optimizer.step()
    assert torch.equal(before, model.output[0].weight)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_modules_without_parameters(requires_grad: bool) -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Dropout(0.5))
    optimizer = adam(model)
    weight, mean = model[0].weight.clone(), model[1].running_mean.clone()
    with frozen(model, "1", "2", optimizer=optimizer, requires_grad=requires_grad) as freezing:
        step(model, optimizer)
        assert modes(model) == {"": True, "0": True, "1": False, "2": False}
        state = freezing.state_dict()
    assert torch.equal(model[1].running_mean, mean)
    assert not torch.equal(model[0].weight, weight)
    freezing.load_state_dict(state)
    assert freezing.is_active


def test_a_shared_dropout_goes_on_in_the_other_part() -> None:
    dropout = nn.Dropout(0.5)
    model: Any = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), dropout) for _ in range(2)])
    for target in ("0", "0.*"):
        with frozen(model, target, optimizer=adam(model)):
            assert (model[0].training, model[0][0].training) == (False, False)
            assert dropout.training


def test_recurrent_layers_keep_the_mode_that_cudnn_needs() -> None:
    model: Any = nn.ModuleDict({"encoder": nn.Sequential(nn.GRU(3, 3)), "head": nn.Linear(3, 1)})
    with frozen(model, "encoder", optimizer=adam(model)):
        assert modes(model) == {"": True, "encoder": False, "encoder.0": True, "head": True}
    assert all(modes(model).values())
