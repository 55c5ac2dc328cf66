"""``recipes/benchmark.py``: what it measures, and that the variants it compares train alike."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launching import ROOT


def measure(directory: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """What ``recipes/benchmark.py`` prints, and its figures."""
    output = directory / "figures.json"
    command = [sys.executable, str(ROOT / "recipes" / "benchmark.py"), *arguments]
    done = subprocess.run(
        [*command, "--repeats", "3", "--output", str(output)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(output.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == figures
    return done.stdout, figures


def test_that_a_directory_that_is_not_there_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "nowhere" / "figures.json")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "rotograd", "--output", output])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "recipes" / "benchmark.py"), run_name="__main__")
    assert "there is no directory" in capsys.readouterr().err


def test_isolation(tmp_path: Path) -> None:
    printed, figures = measure(tmp_path, "isolation", "--hidden_size", "8", "--batch_size", "4")
    assert "One step of two models" in printed
    rows = {row["variant"]: row for row in figures["rows"]}
    assert len(rows) == 4
    for row in rows.values():
        baseline = rows[row["against"] or row["variant"]]
        assert row["ratio"] == row["median_ms"] / baseline["median_ms"] > 0


def test_rotograd(tmp_path: Path) -> None:
    sizes = ["--num_tasks", "2", "3", "--sizes", "4", "--batch_size", "6"]
    printed, figures = measure(tmp_path, "rotograd", *sizes)
    assert "plain sum of losses" in printed
    settings = {(row["network"], row["num_tasks"], row["size"]) for row in figures["rows"]}
    assert settings == {("mlp", 2, 4), ("mlp", 3, 4), ("cnn", 2, 4), ("cnn", 3, 4)}
    for row in figures["rows"]:
        assert row["rotograd time ratio"] > 0
        assert row["sum (MiB)"] > 0
