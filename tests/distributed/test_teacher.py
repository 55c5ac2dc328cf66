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

from tests.jobs.teacher_setting import (
    CORE,
    DONOR_WEIGHT,
    OVERFLOWS,
    REST,
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


def train(directory: Path, settings: str) -> Path:
    """Train all of ``core`` or ``rest``, on two ranks."""
    with Launcher(directory) as launch:
        launch("tests/jobs/teacher_job.py", directory, settings, num_processes=2).wait(TIMEOUT)
    return directory


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every setting of the core has left its weights."""
    return train(tmp_path_factory.mktemp("core"), "core")


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the rest."""
    return train(tmp_path_factory.mktemp("rest"), "rest")


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


@pytest.mark.parametrize("setting", CORE, ids=lambda setting: setting.name)
def test_that_two_ranks_with_a_teacher_equal_one_process(core: Path, setting: Setting) -> None:
    check(core / setting.name, setting)


@pytest.mark.slow
@pytest.mark.parametrize("setting", REST, ids=lambda setting: setting.name)
def test_that_the_rest_equals_one_process(rest: Path, setting: Setting) -> None:
    check(rest / setting.name, setting)


def check(directory: Path, setting: Setting) -> None:
    steps = json.loads((directory / "steps.json").read_text())
    mine, other = (load_file(directory / f"receiver-{rank}.safetensors") for rank in (0, 1))
    assert largest_difference(mine, other) == 0.0

    expected, distances = train_by_hand(setting, steps)
    # bf16 rounds otherwise in batches of other sizes
    tolerance = 1e-3 if setting.precision == "bf16" else 1e-12
    assert largest_difference(mine, expected) <= tolerance
    wrong, _ = train_by_hand(setting, steps, DONOR_WEIGHT * 0.95)
    assert largest_difference(wrong, expected) > 2 * tolerance, "this setting sees no wrong factor"
    for step, distance in zip(steps, distances, strict=True):
        told = step["metrics"].get("loss/teacher donor (per sample)")
        assert (told is None) == (step["version"] is None)
        assert told is None or told == pytest.approx(
            distance, rel=0.1 if tolerance > 1e-9 else 1e-9
        )

    versions = [step["version"] for step in steps]
    taken = {1, 3} if setting.fault else {1, 2, 3}
    assert set(versions) == ({None, *taken} if setting.by_turns else {1})
    skipped = [window for window, step in enumerate(steps) if not step["stepped"]]
    assert skipped == (list(OVERFLOWS) if setting.precision == "fp16" else [])


def test_how_many_collectives_a_teacher_costs(core: Path) -> None:
    steps = json.loads((core / Setting(by_turns=True).name / "steps.json").read_text())
    # The window's counts and the vote on signals; with a teacher, which ranks have a gradient, and
    # each tensor of the head; and, unless no head is taught or about to be, what is new.
    counts = {(s["version"] is not None, s["num_collectives"]) for s in steps[1:]}
    assert counts == {(False, 2), (False, 3), (True, 5), (True, 6)}


def test_that_weights_which_one_rank_has_otherwise_are_put_aside(core: Path) -> None:
    assert rejected(core / Setting(by_turns=True, fault="other").name) == "unreadable"


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "reason"), [("damaged", "digest"), ("missing", "unreadable")])
def test_that_bad_weights_are_put_aside(rest: Path, fault: str, reason: str) -> None:
    assert rejected(rest / Setting(by_turns=True, fault=fault).name) == reason


def rejected(directory: Path) -> str:
    """Why the second weights, and no others, were refused."""
    stream = directory / "runs" / "0001" / "bridge" / "donor.weights"
    (note,) = (stream / "rejected").glob("*.json")
    assert note.stem == "0000000001"
    left = sorted(path.stem for path in (stream / "records").glob("*"))
    assert left == ["0000000000", "0000000002"]
    reason: str = json.loads(note.read_text())["reason"]
    return reason
