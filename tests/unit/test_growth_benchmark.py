"""The benchmark's growth: what it measures is done, its rows are there, and no file is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from toolkit.benchmarks.bridge.growth import (
    CrowdedStream,
    SimulatedRun,
    measure_donors,
    measure_files,
)
from toolkit.benchmarks.bridge.starts import commands


def test_that_a_step_takes_one_payload_of_each_donor(tmp_path: Path) -> None:
    run = SimulatedRun(tmp_path, num_donors=3, num_parameters=5)
    for step in range(4):
        assert run.step == step
        run.publish()
        assert torch.equal(run.take()["weight"], torch.full((5,), 3.0))


def test_donors(tmp_path: Path) -> None:
    rows = measure_donors(tmp_path, [1, 2], repeats=2).rows
    assert [row["donors"] for row in rows] == [1, 2]
    for row in rows:
        each = float(row["a payload, ms"])
        assert float(row["step, ms"]) == pytest.approx(int(row["donors"]) * each)
        assert row["/ fewest"] == pytest.approx(each / float(rows[0]["a payload, ms"]))


def test_that_the_measured_steps_happen_beside_many_files(tmp_path: Path) -> None:
    stream = CrowdedStream(tmp_path, num_files=7)
    path, kept = stream.transport.path("donor", 7), stream.transport.kept_path("donor", 7)
    for what, step in stream.steps().items():
        assert path.exists() is (what not in ("poll", "publish"))
        step()
    assert stream.transport.sequences("donor") == list(range(8))
    assert path.samefile(kept)
    stream.clear()
    assert not path.exists()
    assert not kept.exists()


def test_files(tmp_path: Path) -> None:
    figures = measure_files(tmp_path, [2, 5], repeats=2)
    found = {(row["what"], row["files"]): float(row["ms"]) for row in figures.rows}
    names = ("poll", "publish", "take", "keep", "list")
    assert list(found) == [(name, num) for name in names for num in (2, 5)]
    for row in figures.rows:
        what = row["what"]
        ratio = None if what == "list" else found[what, row["files"]] / found[what, 2]
        assert row.get("/ fewest") == (None if ratio is None else pytest.approx(ratio))
    assert not list(tmp_path.iterdir())


def test_that_the_first_start_is_what_the_others_are_compared_with() -> None:
    assert next(iter(commands())) == "import torch, accelerate"
