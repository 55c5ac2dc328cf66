"""The record of which layers move: counts, table, checkpoint."""

from __future__ import annotations

import copy

import torch
from rich.console import Console
from torch import nn

from toolkit.changes import ChangeRecord


def build() -> tuple[dict[str, nn.Linear], torch.optim.Optimizer, ChangeRecord]:
    layers = {name: nn.Linear(2, 2, bias=False) for name in ("first", "second", "third")}
    optimizer = torch.optim.Adam([layer.weight for layer in layers.values()], lr=0.5)
    return layers, optimizer, ChangeRecord(layers, optimizer)


def test_that_weights_and_state_are_told_apart() -> None:
    layers, optimizer, record = build()
    layers["first"].weight.grad = torch.ones(2, 2)
    with record.step_of("task"):
        optimizer.step()
    assert record.last["first"] == record.by_task["task"]["first"].largest_change > 0.4
    optimizer.param_groups[0]["lr"] = 0.0  # the moments move, the weights do not
    layers["second"].weight.grad = torch.ones(2, 2)
    with record.step_of("task"):
        optimizer.step()
    with record.step_of("task", enabled=False):
        layers["third"].weight.data.zero_()

    counts = {
        name: (change.steps, change.weight_steps, change.state_steps, change.has_state)
        for name, change in record.by_task["task"].items()
    }
    assert counts == {
        "first": (2, 1, 2, True),
        "second": (2, 0, 1, True),
        "third": (2, 0, 0, False),
    }
    assert record.last == {"first": 0.0, "second": 0.0, "third": 0.0}


def test_that_a_change_of_one_sign_bit_counts() -> None:
    layers, _, record = build()
    layers["first"].weight.data.zero_()
    with record.step_of("task"):
        layers["first"].weight.data.neg_()
    assert record.by_task["task"]["first"].weight_steps == 1
    assert record.last["first"] == 0.0


def test_table_and_checkpoint() -> None:
    layers, optimizer, record = build()
    layers["first"].weight.grad = torch.ones(2, 2)
    with record.step_of("task2"):
        optimizer.step()
    with record.step_of("task1"):
        pass
    state = copy.deepcopy(record.state_dict())
    _, _, again = build()
    again.load_state_dict(state)
    assert again.state_dict() == state
    console = Console(width=80)
    with console.capture() as capture:
        console.print(again.table())
    rows = [line.split("  ") for line in capture.get().splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert ["1 of task1", "first", "unchanged", "unchanged", "0"] in cells
    assert ["1 of task2", "first", "changed in 1", "changed in 1", "0.5"] in cells
    assert ["second", "unchanged", "none", "0"] in cells
