"""What the tests of freezing share: optimizers, a model of two tasks, and bitwise comparison."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

REST = "hidden_task2"  # the layer that rests in most tests


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to make an optimizer."""

    kind: str
    settings: Mapping[str, Any]

    def __call__(self, parameters: Any) -> Optimizer:
        optimizer: Optimizer = getattr(torch.optim, self.kind)(parameters, **self.settings)
        return optimizer


_PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd-decay": ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": ("Adam", {"lr": 0.1}),
    "amsgrad": ("Adam", {"lr": 0.1, "amsgrad": True}),
    "adamw": ("AdamW", {"lr": 0.1, "weight_decay": 0.1}),
    "nadam": ("NAdam", {"lr": 0.1}),
    "radam": ("RAdam", {"lr": 0.1}),
    "adamax": ("Adamax", {"lr": 0.1}),
    "rmsprop": ("RMSprop", {"lr": 0.1}),
    "rmsprop-momentum": ("RMSprop", {"lr": 0.1, "momentum": 0.9, "centered": True}),
    "asgd": ("ASGD", {"lr": 0.1, "weight_decay": 0.1}),
    "rprop": ("Rprop", {"lr": 0.1}),
    "adagrad": ("Adagrad", {"lr": 0.1, "weight_decay": 0.1}),
    "adadelta": ("Adadelta", {"lr": 1.0, "weight_decay": 0.1}),
    "adafactor": ("Adafactor", {"lr": 0.1}),
}
_FUSED = ("SGD", "Adam", "AdamW", "Adagrad")  # on a CPU

OPTIMIZERS = {
    f"{name}-{form}": Recipe(kind, {**settings, **switches})
    for name, (kind, settings) in _PLAIN.items()
    for form, switches in (
        ("loop", {"foreach": False}),
        ("foreach", {"foreach": True}),
        ("fused", {"fused": True}),
    )
    if form != "fused" or kind in _FUSED
}
if hasattr(torch.optim, "Muon"):  # torch 2.9 and later
    OPTIMIZERS["muon-loop"] = Recipe("Muon", {"lr": 0.1, "weight_decay": 0.1})


class Net(nn.Module):
    """Two first layers over one ``output``; only matrices as parameters, as Muon wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_task1 = nn.Linear(3, 4, bias=False)
        self.hidden_task2 = nn.Sequential(
            nn.Linear(2, 4, bias=False), nn.BatchNorm1d(4, affine=False), nn.Dropout(0.5)
        )
        self.output = nn.Linear(4, 2, bias=False)

    def forward(self, first: Tensor | None, second: Tensor | None) -> Tensor:
        """Logits from features (N, 3) of task 1, (N, 2) of task 2, or the sum over both."""
        hidden = []
        if first is not None:
            hidden.append(self.hidden_task1(first))
        if second is not None:
            hidden.append(self.hidden_task2(second))
        outputs: Tensor = self.output(torch.stack(hidden).sum(0).tanh())
        return outputs


def build_net() -> Net:
    """The same weights every time."""
    torch.manual_seed(0)
    return Net().double()


def batches(number: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``number`` batches: features (5, 3) and (5, 2), wanted outputs (5, 2)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        first, second, wanted = (
            torch.randn(5, width, generator=generator, dtype=torch.float64) for width in (3, 2, 2)
        )
        yield first, second, wanted


def squared_error(outputs: Tensor, wanted: Tensor) -> Tensor:
    """The loss of all cases; a scalar."""
    return (outputs - wanted).square().mean()


def snapshot(module: nn.Module, optimizer: Optimizer, prefix: str = "") -> dict[str, Any]:
    """Copies of the parameters, buffers and optimizer state of ``module``, by a telling name."""
    kept: dict[str, Any] = {}
    for name, parameter in module.named_parameters():
        if name.startswith(prefix):
            kept[f"parameter {name}"] = parameter.detach()
            for key, value in optimizer.state.get(parameter, {}).items():
                kept[f"state {key} of {name}"] = value
    for name, buffer in module.named_buffers():
        if name.startswith(prefix):
            kept[f"buffer {name}"] = buffer
    return copy.deepcopy(kept)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of what is not bit by bit the same; absent counts as different."""

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            return torch.equal(one, other)
        return type(one) is type(other) and bool(one == other)

    return [
        name
        for name in sorted({*before, *after})
        if name not in before or name not in after or not same(before[name], after[name])
    ]


def optimizer_without(recipe: Recipe, optimizer: Optimizer, net: nn.Module) -> Optimizer:
    """A new optimizer that has never heard of the resting layer, with the others' state."""
    trained = [param for name, param in net.named_parameters() if not name.startswith(REST)]
    smaller = recipe(trained)
    for parameter in trained:
        if parameter in optimizer.state:
            smaller.state[parameter] = copy.deepcopy(optimizer.state[parameter])
    return smaller
