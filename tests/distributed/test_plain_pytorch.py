"""Loops of plain PyTorch, as the docstrings have them: ``python`` or ``torchrun`` starts them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.examples import examples_of
from tests.launching import Launcher
from tests.oracle import NUM_SAMPLES, Case, build_dataset, build_network, largest_difference
from toolkit.bridge import donor, receiver

TIMEOUT = 200.0  # seconds, for a hang only
BATCH_SIZE = {"h1": 5, "h2": 7}  # of a rank

# What a user has already, with DDP of their own where there are several ranks.
MY_PROJECT = """
import os
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from tests.oracle import Case, build_dataset, build_network

HAS_RANKS = "WORLD_SIZE" in os.environ
if HAS_RANKS:
    dist.init_process_group("gloo")

def build_model():
    model = build_network(Case())
    model.heads["{other}"].requires_grad_(False)
    return DistributedDataParallel(model) if HAS_RANKS else model

def loader(head, size):
    dataset = build_dataset(Case(), head)
    sampler = DistributedSampler(dataset, shuffle={shuffle}, seed=3) if HAS_RANKS else None
    return DataLoader(dataset, size, sampler=sampler)

def h1_dataloader():
    return loader("h1", 5)

def h2_dataloader():
    return loader("h2", 7)
"""
SAVE = """
from safetensors.torch import save_model
save_model(receiver.model, f"receiver-{accelerator.process_index}.safetensors")
"""


def windows(head: str, num_processes: int, epoch: int, shuffle: bool) -> list[list[int]]:
    """The rows of each step of an epoch, over the ranks."""
    order = list(range(NUM_SAMPLES[head]))
    if num_processes > 1:  # a DistributedSampler
        generator = torch.Generator().manual_seed(3 + epoch)
        order = torch.randperm(len(order), generator=generator).tolist() if shuffle else order
        order += order[: -len(order) % num_processes]
    size = BATCH_SIZE[head] * num_processes
    return [order[start : start + size] for start in range(0, len(order), size)]


def train_jointly(num_processes: dict[str, int]) -> dict[str, Tensor]:
    """One epoch of h1's data, and as many batches of h2's, in one process."""
    model = build_network(Case())
    optimizer = torch.optim.AdamW(model.parameters())
    data: dict[str, Any] = {head: build_dataset(Case(), head) for head in BATCH_SIZE}
    donated = (
        window
        for epoch in itertools.count()
        for window in windows("h2", num_processes["h2"], epoch, shuffle=True)
    )
    own = windows("h1", num_processes["h1"], 0, shuffle=False)
    for pair in zip(own, donated, strict=False):
        optimizer.zero_grad()
        for head, rows in zip(BATCH_SIZE, pair, strict=True):
            inputs, labels = data[head][rows]
            cross_entropy(model(inputs, head), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return dict(model.state_dict())


@pytest.mark.parametrize("num_processes", [{"h1": 2, "h2": 1}, {"h1": 1, "h2": 2}], ids=str)
def test_that_plain_loops_train_as_one_job(
    launcher: Launcher, tmp_path: Path, num_processes: dict[str, int]
) -> None:
    jobs = []
    for head, module in (("h1", receiver), ("h2", donor)):
        directory = tmp_path / head
        directory.mkdir()
        (script,) = examples_of(module)
        project = MY_PROJECT.format(other={"h1": "h2", "h2": "h1"}[head], shuffle=head == "h2")
        (directory / "my_project.py").write_text(project)
        (directory / "job.py").write_text(script + (SAVE if head == "h1" else ""))
        ranks = num_processes[head]
        jobs.append(launcher(directory / "job.py", num_processes=ranks, cwd=tmp_path, plainly=True))
    for job in jobs:
        job.wait(TIMEOUT)
    joint = train_jointly(num_processes)
    for rank in range(num_processes["h1"]):
        weights = load_file(tmp_path / f"receiver-{rank}.safetensors")
        assert largest_difference(weights, joint) <= 1e-12


def test_that_ranks_that_believe_to_be_alone_are_refused(
    launcher: Launcher, tmp_path: Path
) -> None:
    (script,) = examples_of(receiver)
    project = MY_PROJECT.format(other="h2", shuffle=False)
    (tmp_path / "my_project.py").write_text(project)
    assert "cpu=not torch.cuda.is_available()" in script
    script = script.replace("cpu=not torch.cuda.is_available()", "")
    (tmp_path / "job.py").write_text(script)
    job = launcher(tmp_path / "job.py", num_processes=2, cwd=tmp_path, plainly=True)
    assert job.wait(TIMEOUT, check=False) != 0
    assert "torch.distributed has 2 processes, and Accelerate takes each" in job.output()
    assert not (tmp_path / "runs").exists()
