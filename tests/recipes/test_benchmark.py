"""``recipes/benchmark.py``: what it measures, and that the variants it compares train alike."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.launching import ROOT


def test_isolation(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "recipes" / "benchmark.py"), "isolation"]
    sizes = ["--repeats", "3", "--hidden_size", "8", "--batch_size", "4"]
    done = subprocess.run(
        [*command, *sizes, "--output", str(output)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "One step of two models" in done.stdout
    figures = json.loads(output.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == figures
    rows = {row["variant"]: row for row in figures["rows"]}
    assert len(rows) == 4
    for row in rows.values():
        baseline = rows[row["against"] or row["variant"]]
        assert row["ratio"] == row["median_ms"] / baseline["median_ms"] > 0
