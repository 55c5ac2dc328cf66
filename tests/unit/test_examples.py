"""The examples that module docstrings begin with, run as they stand there."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from tests.examples import examples_of
from tests.unit.jobs import reset


@pytest.fixture
def names() -> dict[str, Any]:
    """What every example has."""
    reset()
    torch.manual_seed(0)
    return {"torch": torch, "accelerator": Accelerator(cpu=True)}


def run(module: str, names: dict[str, Any]) -> None:
    imported = importlib.import_module(module)
    (example,) = examples_of(imported)
    names |= vars(imported)
    exec(compile(example, f"example of {module}", "exec"), names)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_isolation(names: dict[str, Any]) -> None:
    model1, model2 = nn.Linear(3, 1), nn.Linear(2, 3)
    before = flat(model1), flat(model2)
    for number, model in enumerate((model1, model2), 1):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        names[f"model{number}"], names[f"optimizer{number}"] = names["accelerator"].prepare(
            model, optimizer
        )
    names["dataloader"] = DataLoader(TensorDataset(torch.randn(8, 2), torch.randn(8, 3)), 4)
    run("toolkit.isolation", names)
    assert not torch.equal(flat(model1), before[0])
    assert not torch.equal(flat(model2), before[1])


def test_freezing(names: dict[str, Any]) -> None:
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("hidden_task1", "hidden_task2")})
    optimizer = torch.optim.Adam(model.parameters())
    before = {name: flat(layer) for name, layer in model.items()}
    names |= {"model": model, "optimizer": optimizer, "batch_of_task1": torch.randn(5, 3)}
    names["loss"] = lambda model, batch: sum(
        layer(batch).square().mean() for layer in model.values()
    )
    run("toolkit.freezing", names)
    assert torch.equal(flat(model["hidden_task2"]), before["hidden_task2"])
    assert not torch.equal(flat(model["hidden_task1"]), before["hidden_task1"])


def test_rotograd(names: dict[str, Any]) -> None:
    backbone, heads = nn.Linear(4, 6), [nn.Linear(6, 2) for _ in range(2)]
    before = flat(backbone)
    labels = [torch.randint(2, (8,)) for _ in heads]
    names |= {"backbone": backbone, "size_z": 6, "head1": heads[0], "head2": heads[1]}
    names |= {"loss_fn1": cross_entropy, "loss_fn2": cross_entropy}
    names["loader"] = DataLoader(TensorDataset(torch.randn(8, 4), *labels), 4)
    run("toolkit.rotograd", names)
    assert not torch.equal(flat(backbone), before)
