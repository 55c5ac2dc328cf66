"""A tracker other than TensorBoard, with the recipes as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launching import Launcher
from tests.recipes.running import DONOR, RECEIVER, ROOT, TIMEOUT


def test_trackio(launcher: Launcher, tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="needs trackio")
    env = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    flags = ["--report_to", "trackio", "--eval_steps", 2]
    jobs = [
        launcher(ROOT / DONOR, *flags, cwd=tmp_path, env=env),
        launcher(ROOT / RECEIVER, *flags, "--max_train_steps", 4, cwd=tmp_path, env=env),
    ]
    for job in jobs:
        job.wait(TIMEOUT)

    def ask(*question: str) -> Any:
        command = [sys.executable, "-m", "trackio.cli", *question, "--project", "gradient-bridge"]
        answer = subprocess.run(
            [*command, "--json"],
            env={**os.environ, **env},
            cwd=tmp_path,
            capture_output=True,
            check=True,
        )
        return json.loads(answer.stdout)

    assert sorted(ask("list", "runs")["runs"]) == ["0001-donor", "0001-receiver"]
    of_receiver = ["--run", "0001-receiver", "--metric"]
    losses = [
        {entry["step"]: entry["value"] for entry in ask("get", "metric", *run, tag)["values"]}
        for run, tag in (
            (of_receiver, "loss/donor (per sample)"),
            (["--run", "0001-donor", "--metric"], "loss/donor (per sample)"),
        )
    ]
    assert set(losses[0]) == {1, 2, 3, 4}
    assert {step: losses[1][step] for step in losses[0]} == losses[0], "both over the same steps"
    accuracies = ask("get", "metric", *of_receiver, "accuracy/h1 (%)")["values"]
    results = json.loads((tmp_path / "runs" / "0001" / "receiver" / "results.json").read_bytes())
    assert accuracies[-1]["step"] == 4
    assert accuracies[-1]["value"] == pytest.approx(results["accuracies (%)"]["h1"])
    assert not list(tmp_path.glob("runs/*/*/events.out.tfevents.*"))
    for job, role in zip(jobs, ("donor", "receiver"), strict=True):
        assert f"curves: trackio, run 0001-{role} of project gradient-bridge" in job.output()


def test_that_a_tracker_without_its_package_is_refused(launcher: Launcher, tmp_path: Path) -> None:
    job = launcher(ROOT / RECEIVER, "--report_to", "clearml", cwd=tmp_path)
    assert job.wait(TIMEOUT, check=False) != 0
    assert "error: --report_to clearml: its package is not installed" in job.output()
