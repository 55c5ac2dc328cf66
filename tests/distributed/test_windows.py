"""``window_indices`` against a job of two ranks that really runs."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from tests.launching import Launcher
from toolkit.data import window_indices, windows_per_epoch


def test_windows_of_two_ranks(launcher: Launcher, tmp_path: Path) -> None:
    sizes = {"num_samples": 83, "batch_size": 8, "accumulation": 4}  # 6 batches by rank and epoch
    job = launcher("tests/jobs/windows_job.py", tmp_path, *sizes.values(), 11, num_processes=2)
    job.wait(120)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank.pop() for rank in ranks] == [[], []]
    expected = [first + second for first, second in zip(*ranks, strict=True)]
    windows = window_indices(83, 8, 4, num_processes=2, seed=11)
    assert list(islice(windows, len(expected))) == expected
    assert len(expected) == 3 * windows_per_epoch(83, 8, 4, num_processes=2)
