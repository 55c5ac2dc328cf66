"""Campaigns of faults, and half an hour of kills; each is a command of its own too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.injector import KILL, START, Fault, Injector, Plan
from tests.launching import ROOT

HOURS = 3600


def run(module: str, output: Path, *flags: object) -> dict[str, Any]:
    """What a command reports."""
    command = [sys.executable, "-m", f"tests.faults.{module}", *map(str, flags)]
    ended = subprocess.run(
        [*command, "--output", str(output)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert ended.returncode == 0, (output / "report.json").read_text()
    print(ended.stdout)
    report: dict[str, Any] = json.loads(ended.stdout)
    return report


@pytest.mark.faults
@pytest.mark.timeout(3 * HOURS)
@pytest.mark.parametrize(("mode", "num_faults"), [("forked", 850), ("launched", 150)])
def test_that_no_fault_changes_the_weights(tmp_path: Path, mode: str, num_faults: int) -> None:
    report = run("campaign", tmp_path / "campaign", mode, "--faults", num_faults)

    assert report["problems"] == 0
    assert report["faults"] >= num_faults
    assert report["by action"][KILL] >= num_faults / 5
    assert report["payloads rejected"] >= 1
    if mode == "forked":
        assert report["points without a fault"] == []


@pytest.mark.faults
@pytest.mark.timeout(2 * HOURS)
def test_that_half_an_hour_of_kills_does_not_change_the_weights(tmp_path: Path) -> None:
    report = run("kill_loop", tmp_path / "kills", "--minutes", 30)

    assert report["problems"] == 0
    assert report["rounds"] >= 1
    assert report["jobs killed"] >= 40


def test_that_a_fault_is_used_once(tmp_path: Path) -> None:
    fault = Fault("donor", 1, START, "attach: begun", "ENOSPC")
    plan = Plan.write(tmp_path / "faults", [fault])
    injectors = [Injector(plan, "donor", 1), Injector(Plan(plan.directory), "donor", 1)]

    Injector(plan, "donor", 0).reach("attach: begun")
    Injector(plan, "receiver", 1).reach("attach: begun")
    injectors[0].reach("attach: done")
    assert plan.used() == []
    with pytest.raises(OSError, match="No space left"):
        injectors[0].reach("attach: begun")
    for injector in injectors:
        injector.reach("attach: begun")
    assert plan.used() == [fault]
