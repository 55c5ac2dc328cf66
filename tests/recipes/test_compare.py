"""``recipes/compare.py``: its tables say what its figures say."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.launching import ROOT


def compare(output_dir: Path, *flags: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, str(ROOT / "recipes" / "compare.py"), *flags]
    done = subprocess.run(
        [*command, "--output_dir", str(output_dir)],
        capture_output=True,
        text=True,
        cwd=output_dir.parent,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads((output_dir / "results.json").read_text()), done.stdout


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["sum", "nosuch"], "--methods: 'nosuch' is neither"),
        (["sum", "mgda", "sum"], "'sum' is there more than once"),
    ],
)
def test_that_no_job_starts_for_methods_that_do_not_go(
    methods: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", "pair", "--methods", *methods])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "recipes" / "compare.py"), run_name="__main__")
    assert message in capsys.readouterr().err


def test_toy(tmp_path: Path) -> None:
    figures, output = compare(tmp_path / "toy", "toy", "--num_seeds=6", "--max_train_steps=8")
    assert "seed 5, which the authors show" in output
    vanilla, rotograd = (figures["methods"][name] for name in ("vanilla", "rotograd"))
    assert len(figures["methods"]) == 5
    assert len(rotograd["losses"]) == figures["num_seeds"] == 6
    means = [[sum(losses) / 2 for losses in rows["losses"]] for rows in (vanilla, rotograd)]
    better = sum(other < one - 1e-3 for one, other in zip(*means, strict=True))
    assert rotograd["better than vanilla"] == better
    assert rotograd["mean loss"] == sum(means[1]) / 6
    assert Image.open(tmp_path / "toy" / "trajectories.png").width > 1000
    events = EventAccumulator(str(tmp_path / "toy")).Reload()
    assert "toy/trajectories" in events.Tags()["images"]


@pytest.mark.slow
def test_pair(tmp_path: Path) -> None:
    flags = ["--methods", "rotograd", "--num_seeds=1", "--max_train_steps=4"]
    figures, output = compare(tmp_path / "pair", "pair", *flags)
    assert set(figures["metrics"]) == {"rotograd"}
    for method, [one] in figures["metrics"].items():
        job = json.loads((tmp_path / "pair" / f"{method}-0" / "results.json").read_text())
        assert job["metrics"] == one
        assert job["completed_steps"] == 4
        assert f"{one['MSE/sum']:.1f}" in output
