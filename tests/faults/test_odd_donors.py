"""Donors that go wrong in silence, as launched jobs: the alarm comes, and where it is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.faults.odd_donor import GOOD_BATCHES
from tests.launching import Launcher
from tests.recipes.running import RECEIVER, TIMEOUT, Recipes
from toolkit.bridge.reasons import Alarm
from toolkit.bridge.sentinel import LOSS_SPAN, PATIENCE

pytestmark = pytest.mark.faults

ODD_DONOR = "tests/faults/odd_donor.py"
# What is wrong, the alarm, and the number of the first payload that raises it.
CASES: list[tuple[str, Alarm, int]] = [
    ("zero", "zero", PATIENCE - 1),
    ("frozen", "idle head", PATIENCE - 1),
    ("pixels", "norm", GOOD_BATCHES),
    ("shuffled", "flat loss", 2 * LOSS_SPAN - 1),
]
MORE_STEPS = 8


def train(launcher: Launcher, cwd: Path, what: str, num_steps: int, *flags: object) -> Any:
    """What the receiver wrote down, its output, and its alarms by step."""
    recipes = Recipes(launcher, cwd)
    common = ["--run", "mine", "--exchange", "gradient"]
    recipes(ODD_DONOR, *common, what)
    receiver = recipes(RECEIVER, *common, "--max_train_steps", num_steps, *flags)
    receiver.wait(TIMEOUT)
    curves = EventAccumulator(str(recipes.path("mine", "receiver"))).Reload()
    alarms = {event.step: event.value for event in curves.Scalars("events/alarms donor [alarms]")}
    trail = recipes.path("mine", "bridge", "receiver", "ledger-0001.jsonl").read_text()
    entries = [json.loads(line) for line in trail.splitlines()]
    return recipes.results("mine", "receiver"), receiver.output(), alarms, entries


@pytest.mark.parametrize(("what", "alarm", "first"), CASES)
def test_that_the_alarm_is_said_everywhere(
    launcher: Launcher, tmp_path: Path, what: str, alarm: Alarm, first: int
) -> None:
    num_steps = first + MORE_STEPS
    results, output, alarms, entries = train(launcher, tmp_path, what, num_steps)
    assert output.count("ALARM: the donor") == 1
    assert results["alarms"]["donor"][alarm] >= MORE_STEPS - 1
    # Step 1 is that of payload 0.
    assert [step for step, number in alarms.items() if number][:1] == [first + 1]
    assert [entry["fate"] for entry in entries] == ["applied"] * num_steps, "a warning only"


@pytest.mark.parametrize(("what", "alarm", "first"), [c for c in CASES if c[1] != "flat loss"])
def test_that_nothing_of_it_is_applied_if_it_is_to_be_rejected(
    launcher: Launcher, tmp_path: Path, what: str, alarm: Alarm, first: int
) -> None:
    num_steps = first + MORE_STEPS
    results, output, alarms, entries = train(
        launcher, tmp_path, what, num_steps, "--on_alarm", "reject"
    )
    applied = [entry["sequence"] for entry in entries if entry["fate"] == "applied"]
    assert applied == list(range(first))
    others = [(entry["fate"], entry["reason"]) for entry in entries[first:]]
    assert set(others) == {("rejected", "alarm"), ("skipped", "")}
    assert results["fates"]["applied"] == first
    assert results["fates"]["rejected"] == others.count(("rejected", "alarm"))
    assert output.count("ALARM: the donor") == 1
    assert results["alarms"]["donor"][alarm] == results["fates"]["rejected"]
    assert [step for step, number in alarms.items() if number][:1] == [first + 1]
