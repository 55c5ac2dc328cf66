"""Jobs with ``transformers.Trainer`` equal joint training in one process; wrong ones do not."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.examples import examples_of
from tests.launching import Launcher
from tests.oracle import largest_difference

pytest.importorskip("transformers")

from transformers import Trainer, TrainingArguments

from tests.trainer_case import (
    DONOR_WEIGHT,
    TrainerCase,
    build_dataset,
    build_model,
    collate,
    train_by_hand,
    train_jointly,
)
from toolkit import transformers_trainer

JOB = "tests/jobs/trainer_job.py"
TIMEOUT = 240.0  # seconds, for a hang only
NUM_PROCESSES = 2  # of the receiver

EXACT = [
    TrainerCase(tokens=True),
    TrainerCase(tokens=True, accumulation=1, donor_accumulation=1),
    TrainerCase(tokens=True, donor_trainer=False),
    TrainerCase(tokens=False),
    TrainerCase(tokens=False, accumulation=2, donor_trainer=False),
]
WRONG = [
    TrainerCase(tokens=True, mutation="forget_accumulation"),
    TrainerCase(tokens=True, mutation="inject_after_clip"),
    TrainerCase(tokens=False, mutation="each_micro_batch_as_one"),
]


# What a user has already: a model and a data set for each job.
MY_PROJECT = """
from tests import trainer_case
from tests.trainer_case import TrainerCase, build_dataset, collate

def build_model(own):
    return trainer_case.build_model(TrainerCase(tokens=True), own)

def h1_dataset():
    return build_dataset(TrainerCase(tokens=True), "h1")

def h2_dataset():
    return build_dataset(TrainerCase(tokens=True), "h2")
"""


def write_cases(directory: Path, cases: list[TrainerCase]) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / "cases.json"
    path.write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of each job trains all cases: a receiver of two ranks, a donor of one."""
    directory = tmp_path_factory.mktemp("trainer")
    cases = write_cases(directory, EXACT + WRONG)
    with Launcher(directory) as launch:
        jobs = [
            launch(JOB, role, cases, directory, num_processes=ranks)
            for role, ranks in (("donor", 1), ("receiver", NUM_PROCESSES))
        ]
        for job in reversed(jobs):
            job.wait(TIMEOUT)
    return directory


def distance(directory: Path, joint: dict[str, Tensor], rank: int = 0) -> float:
    """Of the receiver's final weights to joint training's."""
    return largest_difference(load_file(directory / f"receiver-{rank}.safetensors"), joint)


@pytest.mark.parametrize("case", EXACT, ids=[str(place) for place in range(len(EXACT))])
def test_that_a_trainer_trains_as_one_job(trained: Path, case: TrainerCase) -> None:
    directory = trained / str(EXACT.index(case))
    joint, alone = (train_jointly(case, NUM_PROCESSES, weight) for weight in (DONOR_WEIGHT, 0.0))
    for rank in range(NUM_PROCESSES):
        assert distance(directory, joint, rank) <= 1e-12
    assert distance(directory, alone) > 1e-3  # the donor's part is no trifle


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.mutation)
def test_that_a_wrong_factor_is_seen(trained: Path, case: TrainerCase) -> None:
    directory = trained / str(len(EXACT) + WRONG.index(case))
    assert distance(directory, train_jointly(case, NUM_PROCESSES)) > 1e-6


@pytest.mark.slow  # its parts are in tests/unit/test_transformers_trainer.py
def test_that_a_checkpoint_of_the_trainer_has_the_bridges_position(
    launcher: Launcher, tmp_path: Path
) -> None:
    case = TrainerCase(tokens=True, save_steps=2)
    failing = write_cases(tmp_path / "failing", [dataclasses.replace(case, fail_at=3)])
    resumed = write_cases(tmp_path / "resumed", [dataclasses.replace(case, resume_from=2)])
    donor = launcher(JOB, "donor", failing, tmp_path)
    assert launcher(JOB, "receiver", failing, tmp_path).wait(TIMEOUT, check=False) != 0
    launcher(JOB, "receiver", resumed, tmp_path).wait(TIMEOUT)
    donor.wait(TIMEOUT)
    assert distance(tmp_path / "0", train_jointly(case, 1)) <= 1e-12


def test_that_the_docstrings_scripts_train_as_one_job(launcher: Launcher, tmp_path: Path) -> None:
    (tmp_path / "my_project.py").write_text(MY_PROJECT)
    jobs = []
    for role, script in zip(("receiver", "donor"), examples_of(transformers_trainer), strict=True):
        assert len(script.splitlines()) <= 10
        (tmp_path / f"{role}.py").write_text(script)
        jobs.append(launcher(tmp_path / f"{role}.py", cwd=tmp_path))
    for job in jobs:
        job.wait(TIMEOUT)
    case = TrainerCase(tokens=True)
    own, donated = (
        shuffled(tmp_path, head, build_dataset(case, head), accumulation)
        for head, accumulation in (("h1", 3), ("h2", 1))
    )
    joint = train_by_hand(
        build_model(case, "h1"), own, donated, 4,
        donor_weight=1.0, learning_rate=5e-5, weight_decay=0.0, max_grad_norm=1.0,
    )  # fmt: skip
    assert largest_difference(load_file(tmp_path / "h1" / "model.safetensors"), joint) <= 1e-12


def shuffled(
    directory: Path, head: str, dataset: Any, accumulation: int
) -> Iterator[list[dict[str, Tensor]]]:
    """The windows of a Trainer's default settings."""
    args = TrainingArguments(str(directory / head), use_cpu=True, remove_unused_columns=False)
    trainer = Trainer(nn.Linear(1, 1), args, collate, dataset)
    dataloader: Any = trainer.get_train_dataloader()
    for epoch in itertools.count():
        dataloader.set_epoch(epoch)
        batches = list(dataloader)
        for start in range(0, len(batches), accumulation):
            yield batches[start : start + accumulation]
