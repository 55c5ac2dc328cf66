"""Many foreign files, and many jobs at once."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import Counter
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from tests.unit.jobs import ReceiverAlone
from tests.unit.starts import CLAIM, TERMS, Jobs
from toolkit.bridge.authentication import UNSIGNED
from toolkit.bridge.config import BridgeConfig
from toolkit.bridge.runs import attach

NUM_FOREIGN, NUM_STEPS, NUM_JOBS, NUM_RACES = 100_000, 10, 8, 10


@pytest.mark.faults
def test_that_100_000_foreign_files_cost_no_listing_a_step(
    tmp_path: Path, fresh_state: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ReceiverAlone(tmp_path / "runs")
    records = job.receiver.transport.root / "donor" / "records"
    for number in range(NUM_FOREIGN):
        os.mknod(records / f"foreign-{number}")
    listings: list[str] = []
    for name in ("listdir", "scandir"):
        original = getattr(os, name)

        def count(path: Any = ".", original: Any = original) -> Any:
            if str(path) == str(records):
                listings.append(str(path))
            return original(path)

        monkeypatch.setattr(os, name, count)
    for _ in range(NUM_STEPS):
        with job.accelerator.accumulate(job.model):
            job.backward()
            job.donate(job.constant(1.0))
            job.receiver.inject()
            job.optimizer.step()
            assert job.receiver.commit()
    assert len(listings) <= 1, "a step that finds its payload lists nothing"
    fates = job.receiver.fates()
    assert (fates["applied"], fates["published"]) == (NUM_STEPS, NUM_STEPS)
    assert fates["alien"] == NUM_FOREIGN
    job.receiver.close()


def start_at_once(
    runs_dir: Path, role: Any, barrier: Barrier, results: Queue[tuple[str, str, int]]
) -> None:
    for race in range(NUM_RACES):
        barrier.wait()
        name = {} if role == "receiver" else {"donor_name": role}
        config = BridgeConfig(runs_dir=runs_dir / str(race), run="pair", **name)
        kind: Any = "donor" if name else "receiver"
        attachment = attach(kind, config, TERMS, CLAIM, UNSIGNED)
        results.put((str(race), attachment.run_id, attachment.attempt))


@pytest.mark.faults
def test_that_of_many_processes_at_once_one_founds_the_run(tmp_path: Path, jobs: Jobs) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(NUM_JOBS), context.Queue()
    roles = ["receiver", *(f"donor-{number}" for number in range(1, NUM_JOBS))]
    processes = [
        context.Process(target=start_at_once, args=(tmp_path / "race", role, barrier, results))
        for role in roles
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=30) for _ in range(NUM_JOBS * NUM_RACES)]
    for process in processes:
        process.join()
    assert Counter(race for race, _, _ in found) == {str(n): NUM_JOBS for n in range(NUM_RACES)}
    for race in range(NUM_RACES):
        run = tmp_path / "race" / str(race) / "pair"
        agreed = json.loads((run / "bridge" / "run.json").read_bytes())
        assert {(i, a) for r, i, a in found if r == str(race)} == {(agreed["run_id"], 1)}
        assert agreed["founder"] in roles
        assert os.listdir(run.parent) == ["pair"]
        assert not [name for name in os.listdir(run / "bridge") if name.startswith(".tmp")]
