"""A teacher on two ranks, coming and going under every wrapper: the same as in one process.

One launch trains every setting. The oracle is written out by hand and takes in every window the
teacher that the receiver says it had.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.jobs.teacher_job import (
    DONOR_WEIGHT,
    OVERFLOWS,
    SETTINGS,
    TEMPERATURE,
    Setting,
    teacher_weights,
)
from tests.launching import Launcher
from tests.oracle import (
    build_dataset,
    build_network,
    build_optimizer,
    largest_difference,
    summed_loss,
    windows,
)

TIMEOUT = 200.0  # seconds, for a hang only


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every setting has left its weights."""
    directory = tmp_path_factory.mktemp("teacher")
    with Launcher(directory) as launch:
        launch("tests/jobs/teacher_job.py", directory, num_processes=2).wait(TIMEOUT)
    return directory


def distillation(setting: Setting, student: Tensor, teacher: Tensor) -> Tensor:
    """The sum over samples of the distance between logits (N, K)."""
    if setting.distill_loss == "mse":
        return (student - teacher).pow(2).sum() / student.shape[1]
    soft = [torch.softmax(logits / TEMPERATURE, dim=1) for logits in (teacher, student)]
    return TEMPERATURE**2 * (soft[0] * (soft[0].log() - soft[1].log())).sum()


def train_by_hand(
    setting: Setting, steps: list[dict[str, Any]], weight: float = DONOR_WEIGHT
) -> tuple[dict[str, Tensor], list[float]]:
    """Final weights of one process, and each window's distance to its teacher per sample."""
    case = setting.case
    model, teacher = build_network(case), build_network(case, ("h2",))
    optimizer = build_optimizer(case, model)
    data = build_dataset(case, "h1")
    distances = []
    half = setting.precision == "bf16"
    for indices, step in zip(windows(case, "h1", 2), steps, strict=False):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
            loss = summed_loss(model, data, indices, "h1")
            distance = torch.zeros(())
            if step["version"] is not None:
                teacher.load_state_dict(teacher_weights(setting, step["version"]))
                features = data[indices][0]
                with torch.no_grad():
                    target = teacher(features, "h2")
                distance = distillation(setting, model(features, "h2").to(loss.dtype), target)
                loss = loss + weight * distance
        distances.append(float(distance.detach()) / len(indices))
        if step["stepped"]:
            (loss / (len(indices) if case.loss_reduction == "mean" else 1)).backward()
            optimizer.step()
    return {name: t.detach().clone() for name, t in model.state_dict().items()}, distances


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_that_two_ranks_with_a_teacher_equal_one_process(trained: Path, setting: Setting) -> None:
    directory = trained / setting.name
    steps = json.loads((directory / "steps.json").read_text())
    mine, other = (load_file(directory / f"receiver-{rank}.safetensors") for rank in (0, 1))
    assert largest_difference(mine, other) == 0.0

    expected, distances = train_by_hand(setting, steps)
    # bf16 autocast rounds by batch: two one-process runs differ as much (FLOOR).
    tolerance = 1e-3 if setting.precision == "bf16" else 1e-12
    print("DIFF", setting.name, largest_difference(mine, expected))
    assert largest_difference(mine, expected) <= tolerance
    wrong, _ = train_by_hand(setting, steps, DONOR_WEIGHT * 0.95)
    print("WRONG", largest_difference(wrong, expected))
    assert largest_difference(wrong, expected) > 2 * tolerance, "this setting sees no wrong factor"
    for step, distance in zip(steps, distances, strict=True):
        told = step["metrics"].get("loss/teacher donor (per sample)")
        assert (told is None) == (step["version"] is None)
        assert told is None or told == pytest.approx(
            distance, rel=0.1 if tolerance > 1e-9 else 1e-9
        )

    versions = [step["version"] for step in steps]
    assert set(versions) >= ({None, 1, 2, 3} if setting.by_turns else {1})
    skipped = [window for window, step in enumerate(steps) if not step["stepped"]]
    assert skipped == (list(OVERFLOWS) if setting.precision == "fp16" else [])
