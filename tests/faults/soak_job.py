"""One job of a long lockstep run, which writes down now and then what it has grown to.

    python soak_job.py donor|receiver RUNS_DIR NUM_STEPS REPORT

Each line of REPORT is a JSON object: after how many steps, the resident memory of this process in
bytes, its Python objects' blocks of memory, the files in the run's bridge directory, and how many
listings of directories the last step took, and names they gave.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.oracle import Case, build_dataset, build_network, build_optimizer
from toolkit import BridgeConfig, GradientDonor, GradientReceiver

CHECKPOINT_STEPS, CHECKPOINTS_KEPT = 250, 2
REPORT_STEPS = 100
CASE = Case(dtype="float32")


class Census:
    """Reports, and counts listings of directories and the names that they gave."""

    def __init__(self, report: Path) -> None:
        self._report = report.open("a")
        self.num_listings = self.num_names = 0
        self._listdir = os.listdir
        os.listdir = self._counting  # type: ignore[assignment]

    def _counting(self, path: Any = ".") -> list[str]:
        names = self._listdir(path)
        self.num_listings += 1
        self.num_names += len(names)
        return names

    def step(self, number: int, bridge: Path) -> None:
        """After each step."""
        if number % REPORT_STEPS == 0:
            gc.collect()
            rss = psutil.Process().memory_info().rss
            num_files = sum(len(files) for _, _, files in os.walk(bridge))
            blocks = sys.getallocatedblocks()
            line = {
                "step": number, "rss": rss, "blocks": blocks, "files": num_files,
                "listings": self.num_listings, "names": self.num_names,
            }  # fmt: skip
            self._report.write(json.dumps(line) + "\n")
            self._report.flush()
        self.num_listings = self.num_names = 0


def endless(dataloader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from dataloader


def receive(config: BridgeConfig, num_steps: int, census: Census) -> None:
    accelerator = Accelerator(cpu=True)
    network = build_network(CASE)
    network.heads["h2"].requires_grad_(False)
    optimizer = build_optimizer(CASE, network)
    model, optimizer = accelerator.prepare(network, optimizer)
    receiver = GradientReceiver(accelerator, model, optimizer, config)
    batches = endless(DataLoader(build_dataset(CASE, "h1"), batch_size=5))
    checkpoints = receiver.output_dir
    with receiver:
        while receiver.completed_steps < num_steps:
            features, labels = next(batches)
            loss = F.cross_entropy(model(features, "h1"), labels)
            receiver.backward(loss, num_samples=len(labels))
            receiver.inject()
            optimizer.step()
            optimizer.zero_grad()
            assert receiver.commit()
            step = receiver.completed_steps
            if step % CHECKPOINT_STEPS == 0:
                accelerator.save_state(str(checkpoints / f"step_{step}"))
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(
                        checkpoints / f"step_{step - CHECKPOINT_STEPS * CHECKPOINTS_KEPT}"
                    )
            census.step(step, receiver.transport.root)
        fates = receiver.fates()
    assert receiver.steps_alone == 0
    assert fates["applied"] == num_steps, fates


def donate(config: BridgeConfig, num_steps: int, census: Census) -> None:
    loading = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, dataloader_config=loading)
    network = build_network(CASE, ("h2",))
    optimizer = build_optimizer(CASE, network)
    batches = DataLoader(build_dataset(CASE, "h2"), batch_size=7, shuffle=True)
    model, optimizer, batches = accelerator.prepare(network, optimizer, batches)
    donor = GradientDonor(accelerator, model, optimizer, config)
    with donor:
        for features, labels in donor.follow(batches):
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(features, "h2"), labels)
                donor.backward(loss, num_samples=len(labels))
                assert donor.publish()
                optimizer.zero_grad()
            census.step(donor.completed_windows, donor.transport.root)


def main() -> None:
    role, runs_dir, num_steps, report = sys.argv[1:]
    torch.set_num_threads(1)
    config = BridgeConfig(
        runs_dir=runs_dir,
        exchange="gradient",
        require_peer=True,
        checkpoint_interval=CHECKPOINT_STEPS if role == "receiver" else None,
        checkpoints_kept=CHECKPOINTS_KEPT if role == "receiver" else None,
    )
    run = receive if role == "receiver" else donate
    run(config, int(num_steps), Census(Path(report)))


if __name__ == "__main__":
    main()
