"""``recipes/benchmark.py``: what it measures, and that the variants it compares train alike."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launching import ROOT
from tests.recipes.running import TIMEOUT, wait_until


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


@pytest.mark.slow
def test_rotograd(tmp_path: Path) -> None:
    sizes = ["--num_tasks", "2", "3", "--sizes", "4", "--batch_size", "6"]
    printed, figures = measure(tmp_path, "rotograd", *sizes)
    assert "plain sum of losses" in printed
    settings = {(row["network"], row["num_tasks"], row["size"]) for row in figures["rows"]}
    assert settings == {("mlp", 2, 4), ("mlp", 3, 4), ("cnn", 2, 4), ("cnn", 3, 4)}
    for row in figures["rows"]:
        assert row["rotograd time ratio"] > 0
        assert row["sum (MiB)"] > 0


def exchanges(directory: Path, *flags: str) -> subprocess.Popen[str]:
    """``recipes/benchmark.py exchanges`` with one seed."""
    command = [sys.executable, str(ROOT / "recipes" / "benchmark.py"), "exchanges"]
    command += ["--num_seeds", "1", "--runs_dir", str(directory), *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


@pytest.mark.slow
def test_exchanges(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    rows = ["seed", "gradient-0", "gradient-8", "distill-25"]
    steps = ["--max_train_steps", "24", "--output", str(output)]
    benchmark = exchanges(tmp_path, "--rows", *rows, *steps)
    printed, errors = benchmark.communicate(timeout=TIMEOUT)
    assert benchmark.returncode == 0, printed + errors
    assert "4 trials" in printed
    figures = json.loads(output.read_text())
    found = {row["row"]: row for row in figures["rows"]}
    assert list(found) == rows
    assert found["seed"]["payloads"] == 24
    assert found["gradient-0"]["mean_staleness"] == 0.0
    assert found["gradient-0"]["time_ratio"] == 1.0
    assert 7.0 <= found["gradient-8"]["mean_staleness"] <= 8.0
    assert found["gradient-8"]["mib"] > found["seed"]["mib"] > 0


def jobs_of(benchmark: subprocess.Popen[str]) -> list[psutil.Process]:
    """The donor and the receiver that it has launched, once they are there."""
    process = psutil.Process(benchmark.pid)
    wait_until(lambda: len(process.children()) == 2, "two jobs")
    return process.children()


@pytest.mark.slow
def test_a_job_that_fails_is_named_and_the_other_one_ended(tmp_path: Path) -> None:
    benchmark = exchanges(tmp_path, "--rows", "gradient-0")
    donor, receiver = jobs_of(benchmark)
    donor.kill()
    printed, _ = benchmark.communicate(timeout=TIMEOUT)
    assert benchmark.returncode == 1
    assert "failed: donor of gradient-0, seed 0 ended with status -9" in printed
    assert "gradient-0-seed-0/donor.log" in "".join(printed.split())
    assert not receiver.is_running()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGINT, "interrupted\n"), (signal.SIGTERM, "")], ids=str
)
def test_an_interrupt_leaves_no_job_behind(
    tmp_path: Path, number: signal.Signals, words: str
) -> None:
    benchmark = exchanges(tmp_path, "--rows", "gradient-0")
    jobs = jobs_of(benchmark)
    benchmark.send_signal(number)
    _, errors = benchmark.communicate(timeout=TIMEOUT)
    assert benchmark.returncode == 128 + number
    assert errors == words
    assert not any(job.is_running() for job in jobs)


# -- the bridge ----------------------------------------------------------------------------------


def test_transport(tmp_path: Path) -> None:
    flags = ["--parts", "transport", "--sizes", "0.01", "--runs_dir", str(tmp_path)]
    printed, figures = measure(tmp_path, "bridge", *flags)
    assert "Bandwidth of records over raw files" in printed
    rows = figures["transport"]
    assert {row["disk"] for row in rows} >= {"disk"}
    for row in rows:
        assert row["M params"] == 0.01
        assert min(row["publish / raw"], row["read / raw"]) > 0
    assert max(map(len, printed.splitlines()[:-1])) <= 80, "a table is as wide as a terminal"


@pytest.mark.slow
def test_rounds_with_and_without_the_bridge(tmp_path: Path) -> None:
    """Both kinds of parts that launch: in lockstep, and where no job waits for the other."""
    parts = ["rounds", "steps", "asynchronous", "profile"]
    flags = ["--sizes", "0.01", "--batch_sizes", "2", "--runs_dir", str(tmp_path)]
    flags += ["--plot", str(tmp_path / "bridge.png")]
    printed, figures = measure(tmp_path, "bridge", "--parts", *parts, *flags)
    (row,) = figures["rounds"]
    assert row["MB"] == pytest.approx(0.04, rel=0.2)
    assert row["added / raw"] == pytest.approx((row["step ms"] - row["plain ms"]) / row["raw ms"])
    assert min(row["p50 / raw"], row["p99 / raw"]) > 0
    assert len(figures["steps"]) == 1
    jobs = [(row["exchange"], row["job"]) for row in figures["asynchronous"]]
    assert jobs == [(e, j) for e in ("late gradients", "teacher") for j in ("receiver", "donor")]
    assert all(0 <= row["blocked %"] <= 100 for row in figures["asynchronous"])
    for job in ("receiver", "donor"):
        rows = [row for row in figures["profile"] if row["job"] == job]
        *functions, total = (row["ms a step"] for row in rows)
        assert rows[-1]["function"] == "all"
        assert functions == sorted(functions, reverse=True)
        assert 0 < sum(functions) <= total
    assert (tmp_path / "bridge.png").stat().st_size > 10_000
    assert max(map(len, printed.splitlines()[:-1])) <= 80, "a table is as wide as a terminal"
