"""Donors that share a head, donors of another head, donors that come late and leave early.

Two donors train h2, the second leaves after some windows; the third trains h3 and comes when the
run is under way. The oracle is one process on all silos, which takes in every step the windows
that the ledger says.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from tests.jobs.several_donors_job import (
    DONOR_WEIGHT,
    HEAD_OF,
    LEAVES,
    MIN_APPLIED,
    MIN_STEPS,
    Network,
    build_batches,
    build_dataset,
    build_optimizer,
)
from tests.launching import Job, Launcher
from tests.oracle import largest_difference

JOB = "tests/jobs/several_donors_job.py"
TIMEOUT = 240.0  # seconds, for a hang only
RANKS = {"receiver": 2, "first": 2, "second": 1, "third": 1}


def windows(job: str) -> Iterator[list[int]]:
    """The samples of every step of one job, over its ranks."""
    batches = build_batches(job)
    for epoch in itertools.count():
        batches.set_epoch(epoch)
        of_epoch = list(batches)
        for start in range(0, len(of_epoch), RANKS[job]):
            yield list(itertools.chain(*of_epoch[start : start + RANKS[job]]))


def train_jointly(steps: list[dict[str, int]], rescale: str) -> dict[str, Tensor]:
    """Final weights of one process on all silos.

    Args:
        steps: for every step, the window of each donor that has a part in it.
        rescale: how the parts are weighed.
    """
    model = Network(["h1", "h2", "h3"])
    optimizer = build_optimizer(model)
    data = {job: build_dataset(job) for job in HEAD_OF}
    batches = {job: list(itertools.islice(windows(job), len(steps))) for job in HEAD_OF}
    for step, taken in enumerate(steps):
        own = batches["receiver"][step]
        of_head: dict[str, list[tuple[Tensor, int]]] = defaultdict(list)
        for job, window in {"receiver": step, **taken}.items():
            features, labels = data[job][batches[job][window]]
            logits = model(features, HEAD_OF[job])
            total = F.cross_entropy(logits, labels, reduction="sum")
            of_head[HEAD_OF[job]].append((total, len(labels)))
        union = sum(count for parts in of_head.values() for _, count in parts)
        loss = torch.zeros((), dtype=torch.float64)
        for head, parts in of_head.items():
            weight = DONOR_WEIGHT.get(f"heads.{head}", 1.0)
            count = {"match": sum(n for _, n in parts), "append": len(own), "pool": union}[rescale]
            loss = loss + weight * sum(total for total, _ in parts) / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def steps_of(output: Path) -> list[dict[str, int]]:
    """For every step, the payload of each donor that was applied in it."""
    trail = output / "runs" / "0001" / "bridge" / "receiver" / "ledger-0001.jsonl"
    entries = [json.loads(line) for line in trail.read_text().splitlines()]
    applied = [entry for entry in entries if entry["fate"] == "applied"]
    others = [
        (e["donor"], e["sequence"], e["fate"], e["reason"]) for e in entries if e not in applied
    ]
    # The receiver may be about to step when a donor joins, which then answers the weights before.
    assert others in ([], [("third", 0, "dropped", "stale")])
    steps: list[dict[str, int]] = []
    for entry in applied:
        while len(steps) <= entry["receiver_step"]:
            steps.append({})
        steps[entry["receiver_step"]][entry["donor"]] = entry["sequence"]
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("rescale", ["match", "append", "pool"])
def test_donors_that_come_and_go_equal_joint_training(tmp_path: Path, rescale: str) -> None:
    settings = json.dumps({"rescale": rescale, "num_donors": 2, "peer_wait": 200.0})
    with Launcher(tmp_path) as launch:

        def start(job: str) -> Job:
            flags = ("--expect_processes", RANKS[job])
            return launch(JOB, job, tmp_path, settings, *flags, num_processes=RANKS[job])

        receiver, first, second = (start(job) for job in ("receiver", "first", "second"))
        second.wait(TIMEOUT)  # it leaves
        third = start("third")
        for job in (receiver, first, third):
            job.wait(TIMEOUT)

    steps = steps_of(tmp_path)
    assert len(steps) >= MIN_STEPS
    parts = {donor: [s for s, taken in enumerate(steps) if donor in taken] for donor in HEAD_OF}
    assert parts["first"] == list(range(len(steps))), "a step did not wait for a donor that lives"
    assert parts["second"] == list(range(LEAVES["second"]))
    joined = parts["third"][0]
    assert joined > LEAVES["second"]
    assert parts["third"] == list(range(joined, len(steps)))
    assert len(parts["third"]) >= MIN_APPLIED

    joint = train_jointly(steps, rescale)
    weights = load_file(tmp_path / "receiver-0.safetensors")
    assert largest_difference(weights, joint) <= 1e-12
    assert largest_difference(weights, load_file(tmp_path / "receiver-1.safetensors")) == 0.0
    without = [{d: w for d, w in taken.items() if d != "second"} for taken in steps]
    assert largest_difference(train_jointly(without, rescale), joint) > 1e-3
    assert_fates(tmp_path, parts)


def assert_fates(output: Path, parts: dict[str, list[int]]) -> None:
    fates = json.loads((output / "fates.json").read_bytes())
    assert {d: f["applied"] for d, f in fates["by_donor"].items()} == {
        donor: len(parts[donor]) for donor in ("first", "second", "third")
    }
    for counts in (fates["all"], *fates["by_donor"].values()):
        settled = sum(counts[fate] for fate in ("applied", "dropped", "rejected", "skipped"))
        assert settled + counts["pending"] == counts["published"], counts
