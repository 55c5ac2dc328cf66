"""The README's scripts as they stand there: few lines added, and joint training's weights."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

from tests.launching import Launcher
from tests.oracle import Case, build_dataset, build_network, largest_difference
from tests.recipes.running import ROOT, TIMEOUT

README = (ROOT / "README.md").read_text()
ROLES = ("receiver", "donor")
MAX_ADDED_LINES = 8
BATCH_SIZES = {"h1": 5, "h2": 7}

# What a user has already: a model and one dataloader per job.
MY_PROJECT = """
from torch.utils.data import DataLoader
from tests.oracle import Case, build_dataset, build_network

def build_model():
    return build_network(Case())

def h1_dataloader():
    return DataLoader(build_dataset(Case(), "h1"), batch_size=5)

def h2_dataloader():
    return DataLoader(build_dataset(Case(), "h2"), batch_size=7)
"""
SAVE = """
from safetensors.torch import save_model
save_model(accelerator.unwrap_model(model), "receiver.safetensors")
"""


def diff_of(role: str) -> list[str]:
    """The lines of the README's diff for one job."""
    match = re.search(rf"<!-- script: {role} -->\n```diff\n(.*?)```", README, re.DOTALL)
    assert match, f"the README has no diff for the {role}"
    return match[1].splitlines()


def joint_weights(num_epochs: int = 3, accumulation: int = 2) -> dict[str, torch.Tensor]:
    """The same training written out in one process."""
    case = Case()
    model = build_network(case)
    optimizer = torch.optim.AdamW(model.parameters())
    batches = {}
    for head, size in BATCH_SIZES.items():
        features, labels = build_dataset(case, head)[:]
        batches[head] = list(zip(features.split(size), labels.split(size), strict=True))
    donor = itertools.cycle(batches["h2"])
    for _ in range(num_epochs):
        for start in range(0, len(batches["h1"]), accumulation):
            window = batches["h1"][start : start + accumulation]
            inputs, labels = (torch.cat(parts) for parts in zip(*window, strict=True))
            donor_inputs, donor_labels = next(donor)
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs, "h1"), labels)
            (loss + cross_entropy(model(donor_inputs, "h2"), donor_labels)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return dict(model.state_dict())


def write_scripts(directory: Path) -> None:
    """Both scripts, as the README's diffs leave them."""
    (directory / "my_project.py").write_text(MY_PROJECT)
    for role in ROLES:
        lines = [line[1:] for line in diff_of(role) if not line.startswith("-")]
        text = "\n".join(lines) + (SAVE if role == "receiver" else "")
        (directory / f"{role}.py").write_text(text)


@pytest.mark.parametrize("role", ROLES)
def test_few_lines_are_added(role: str) -> None:
    added = [line for line in diff_of(role) if line.startswith("+")]
    assert 0 < len(added) <= MAX_ADDED_LINES


def test_that_each_promise_has_tests() -> None:
    section = README.split("## What you can rely on")[1].split("\n## ")[0]
    promises = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(promises) > 10
    for line in promises:
        paths = re.findall(r"`([a-z]+/test_\w+\.py)`", line.split(" | ")[1])
        assert paths, line
        for path in paths:
            assert "\ndef test_" in (ROOT / "tests" / path).read_text(), path


def test_the_scripts_train_as_one_job(launcher: Launcher, tmp_path: Path) -> None:
    write_scripts(tmp_path)
    jobs = [launcher(tmp_path / f"{role}.py", cwd=tmp_path) for role in ROLES]
    for job in jobs:
        job.wait(TIMEOUT)
    weights = load_file(tmp_path / "receiver.safetensors")
    assert largest_difference(weights, joint_weights()) <= 1e-12


@pytest.mark.slow
def test_the_scripts_run_on_two_ranks(launcher: Launcher, tmp_path: Path) -> None:
    write_scripts(tmp_path)
    env = {"ACCELERATE_USE_CPU": "true"}  # the scripts would take a GPU
    jobs = [
        launcher(tmp_path / f"{role}.py", cwd=tmp_path, num_processes=2, env=env) for role in ROLES
    ]
    for job in jobs:
        job.wait(TIMEOUT)
    assert "TRAINING ALONE" not in jobs[0].output()
    ledger = tmp_path / "runs" / "0001" / "bridge" / "receiver" / "ledger-0001.jsonl"
    fates = [json.loads(line)["fate"] for line in ledger.read_text().splitlines()]
    # 83 samples in batches of 5, 2 ranks, 2 micro-steps: 5 steps in each of 3 epochs
    assert fates == ["applied"] * 15
