"""A checkpoint of two ranks, to one of which the disk fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launching import Launcher


def saved(launcher: Launcher, directory: Path, rank: int, times: int) -> list[list[Any]]:
    """What each of two ranks has seen: how many they are, its tries, and its error."""
    job = launcher("tests/jobs/checkpoint_job.py", directory, rank, times, num_processes=2)
    job.wait(120)
    return [json.loads((directory / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_that_all_ranks_try_again_where_one_fails(
    launcher: Launcher, tmp_path: Path, rank: int
) -> None:
    assert saved(launcher, tmp_path, rank, times=2) == [[2, 3, ""], [2, 3, ""]]
    names = sorted(path.name for path in (tmp_path / "step_5").iterdir())
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= set(names)


@pytest.mark.faults
def test_that_all_ranks_end_where_the_disk_of_one_fails_for_good(
    launcher: Launcher, tmp_path: Path
) -> None:
    first, second = saved(launcher, tmp_path, rank=1, times=9)

    assert first[:2] == second[:2] == [2, 3]
    assert "the disk of another rank refuses it" in first[2]
    assert "No space left on device" in second[2]
    assert not (tmp_path / "step_5").exists()
