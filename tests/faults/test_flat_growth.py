"""Ten thousand payloads in lockstep: neither the memory of both jobs nor the run's files grow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.soak_job import CHECKPOINT_STEPS, CHECKPOINTS_KEPT, REPORT_STEPS
from tests.launching import ROOT, Launcher

NUM_STEPS = 10_000
SETTLED = 1_000  # steps after which nothing may grow any more
MAX_RSS_GROWTH = 16 * 2**20  # bytes of resident memory
MAX_BLOCKS_A_STEP = 0.1  # of Python objects; an entry in a dictionary takes two or more
MAX_FILES = (CHECKPOINTS_KEPT + 1) * CHECKPOINT_STEPS + 20  # payloads that a resume may ask for
SOAK = ROOT / "tests" / "faults" / "soak_job.py"


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_that_nothing_grows(launcher: Launcher, tmp_path: Path) -> None:
    jobs = {
        role: launcher(SOAK, role, tmp_path / "runs", NUM_STEPS, tmp_path / f"{role}.jsonl")
        for role in ("receiver", "donor")
    }
    for job in jobs.values():
        job.wait(3500)
    for role in jobs:
        lines = [json.loads(line) for line in (tmp_path / f"{role}.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == NUM_STEPS == REPORT_STEPS * len(lines)
        settled = lines[SETTLED // REPORT_STEPS - 1]
        rss, blocks = (lines[-1][name] - settled[name] for name in ("rss", "blocks"))
        most = {name: max(line[name] for line in lines) for name in ("files", "names", "listings")}
        print(f"{role}: {rss / 2**20:.1f} MiB, {blocks} blocks, at most {most}")
        assert rss <= MAX_RSS_GROWTH
        assert blocks <= MAX_BLOCKS_A_STEP * (NUM_STEPS - SETTLED)
        assert most["files"] <= MAX_FILES
        # A look at the receiver's stream lists at most its three newest records.
        named = [line for line in lines if line["names"] > 3 * line["listings"]]
        assert len(named) <= NUM_STEPS / CHECKPOINT_STEPS, "what is kept is listed then only"
