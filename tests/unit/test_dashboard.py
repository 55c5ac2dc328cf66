"""What TensorBoard's pages show beside curves, as plain data."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import nn

from toolkit.bridge.config import BridgeConfig
from toolkit.dashboard import (
    BRIDGE_CHARTS,
    CATEGORY,
    CHARTS,
    MAX_EVENTS,
    MAX_TENSORS,
    Events,
    exchange_table,
    hyperparameters,
    layout,
    plain,
    settings_table,
)
from toolkit.parameters import SharedParameters, shared_parameters

SETTINGS = {"lr": 0.1, "seed": 3, "heads": ["h1", "h2"], "clip": None, "runs_dir": "here"}


class Net(nn.Module):
    """A backbone with a buffer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 3, dtype=torch.bfloat16), nn.BatchNorm1d(3))
        self.heads = nn.ModuleDict({"h2": nn.Linear(3, 4, dtype=torch.float64)})


@pytest.fixture
def shared() -> SharedParameters:
    return shared_parameters(Net(), "backbone", ["heads.h2"])


def row(table: str, name: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` ")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_settings() -> None:
    assert plain(SETTINGS) == {**SETTINGS, "heads": "['h1', 'h2']"}
    assert hyperparameters(SETTINGS) == {
        "lr": 0.1, "seed": 3, "heads": "['h1', 'h2']", "clip": "None",
    }  # fmt: skip
    table = settings_table(SETTINGS)
    assert row(table, "heads") == ["`['h1', 'h2']`"]
    assert table.endswith("\nNot set: `clip`")
    assert "Not set" not in settings_table({"lr": 0.1})


def test_that_each_chart_has_its_tags_and_no_others() -> None:
    tags = {
        "loss in training (per sample)": {
            *("loss/own [per sample]", "loss/donor [per sample]", "loss/critic [per sample]"),
        },
        "accuracy in evaluation (%)": {
            *("accuracy/h1 [%]", "validation/donor h2 [%]", "accuracy/drawings recognised [%]"),
        },
        "staleness of the donors' weights (receiver steps)": {
            "bridge/staleness donor [receiver steps]"
        },
        "cosine of the own and a donor's gradient (backbone)": {
            "gradient/cosine own donor [backbone]"
        },
        "waiting for the other job (% of the step)": {"bridge/wait [% of the step]"},
        "fates of payloads (payloads so far)": {"fates/applied donor [payloads]"},
        "who is there (0 or 1), alarms": {"events/donor present [0 or 1]"},
    }
    others = {"bridge/wait [s]", "bridge/staleness donor [norm of weight change]", "train/lr"}
    charts = layout(BRIDGE_CHARTS)[CATEGORY]
    assert list(charts) == list(tags)
    for title, (kind, (pattern,)) in charts.items():
        assert kind == "Multiline"
        # As TensorBoard does.
        found = {tag for tag in others.union(*tags.values()) if re.match(pattern, tag)}
        assert found == tags[title]
    assert list(layout(CHARTS)[CATEGORY].items()) == list(charts.items())[:2]


@pytest.mark.parametrize(
    ("config", "of_backbone", "of_head", "of_buffer"),
    [
        (
            BridgeConfig(exchange="gradient"),
            ["weights", "sum of gradients (float32)"],
            ["weights", "sum of gradients (float64)"],
            ["weights", ""],
        ),
        (
            BridgeConfig(exchange="auto"),
            ["weights", "sum of gradients (float32); own weights, once alone"],
            ["weights", "sum of gradients (float64); own weights, once alone"],
            ["weights", "own weights, once alone"],
        ),
        (
            BridgeConfig(exchange="gradient", scope="head"),
            ["weights", ""],
            ["weights", "sum of gradients (float64)"],
            ["weights", ""],
        ),
        (
            BridgeConfig(exchange="delta"),
            ["weights", "change in local steps (float32)"],
            ["weights", "change in local steps (float64)"],
            ["weights", ""],
        ),
        (
            BridgeConfig(exchange="distill"),
            ["", "own weights"],
            ["", "own weights"],
            ["", "own weights"],
        ),
    ],
    ids=["gradient", "auto", "head", "delta", "distill"],
)
def test_what_crosses(
    shared: SharedParameters,
    config: BridgeConfig,
    of_backbone: list[str],
    of_head: list[str],
    of_buffer: list[str],
) -> None:
    table = exchange_table(shared, config)
    assert row(table, "backbone.0.weight") == ["3x2", "bfloat16", *of_backbone]
    assert row(table, "heads.h2.bias") == ["4", "float64", *of_head]
    assert row(table, "backbone.1.num_batches_tracked") == ["scalar", "int64", *of_buffer]
    num_bytes = 9 * 2 + 16 * 8 + 4 * 3 * 4 + 8
    assert f": 9 tensors, {num_bytes / 2**20:.3g} MiB." in table


def test_that_what_rests_does_not_cross(shared: SharedParameters) -> None:
    resting = dataclasses.replace(shared, resting=frozenset({"backbone.0.weight"}))
    table = exchange_table(resting, BridgeConfig(exchange="gradient"))
    assert row(table, "backbone.0.weight") == ["3x2", "bfloat16", "", ""]
    assert row(table, "backbone.0.bias")[2:] == ["weights", "sum of gradients (float32)"]


def test_that_a_long_schema_is_cut() -> None:
    backbone = {f"backbone.{i}": nn.Parameter(torch.zeros(1)) for i in range(MAX_TENSORS + 7)}
    table = exchange_table(SharedParameters(backbone, {}, {}), BridgeConfig())
    assert table.count("| `") == MAX_TENSORS
    assert table.endswith("\nand 7 more")


def test_events() -> None:
    events = Events()
    there = {"events/donor present (0 or 1)": 1.0, "events/teacher (0 or 1)": 0.0}
    assert events.note({**there, "loss/own": 3.0, "fates/rejected donor (payloads)": 0.0}, 1)
    assert not events.note({**there, "loss/own": 2.0, "fates/applied donor (payloads)": 1.0}, 2)
    rejected = [
        events.note({**there, "fates/rejected donor (payloads)": float(step - 6)}, step)
        for step in (7, 8, 9)
    ]
    assert rejected == [True, False, False]
    assert events.is_longer
    away = {"events/donor present (0 or 1)": 0.0, "events/teacher (0 or 1)": 1.0}
    assert events.note(away, 10)
    assert events.table().splitlines()[2:] == [
        "| 1 | donor present (0 or 1) | 0 | 1 |",
        "| 7 to 9 | rejected donor (payloads) | 0 | 3 |",
        "| 10 | donor present (0 or 1) | 1 | 0 |",
        "| 10 | teacher (0 or 1) | 0 | 1 |",
    ]
    assert not events.is_longer
    assert events.last_step == 10


def test_that_the_newest_events_are_kept() -> None:
    events = Events()
    for step in range(1, 4 * MAX_EVENTS):
        assert events.note({"events/donor present (0 or 1)": float(step % 2)}, step)
    rows = events.table().splitlines()[2:]
    assert len(rows) == MAX_EVENTS
    assert rows[-1].startswith(f"| {4 * MAX_EVENTS - 1} |")
