"""Which weights a teacher takes: late, bad, of another shape, or on a disk that fails."""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from tests.unit.jobs import reset
from tests.unit.teaching import HEAD, Donor, Learners, weights
from toolkit import BridgeError
from toolkit.bridge.errors import SchemaMismatchError
from toolkit.bridge.teacher import copy_teacher
from toolkit.parameters import shared_parameters


def test_that_a_disk_that_fails_while_weights_are_looked_for_ends_no_step(
    learner: Learners, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = Donor(runs_dir)
    donor.teach(0, weights(1))
    job = learner()
    listdir, failures = os.listdir, []

    def fail(path: Any = ".") -> list[str]:
        if "donor.weights" in str(path):
            failures.append(path)
            raise OSError(errno.EIO, "Input/output error")
        return listdir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", fail)
        job.steps_until(lambda: len(failures) >= 2)
    donor.teach(1, weights(2))
    job.steps_until(lambda: job.versions() == {"donor": 20})


def test_that_a_disk_that_fails_for_another_rank_too_ends_no_step(
    learner: Learners, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = Donor(runs_dir)
    donor.teach(0, weights(1))
    job = learner()
    assert job.receiver._lessons is not None
    teachers = job.receiver._lessons.teachers
    donor.teach(1, weights(2))
    while (offer := teachers.poll()) is None:
        pass
    teachers.begin(offer)

    def fail(path: Any = ".") -> list[str]:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(teachers.control, "min", lambda value: 0.0)  # another rank could not read
        patch.setattr(os, "listdir", fail)
        teachers.refresh()
    assert job.versions() == {"donor": 10}
    donor.teach(2, weights(3))
    job.steps_until(lambda: job.versions() == {"donor": 30})


def test_that_weights_that_come_before_they_are_needed_are_taken_later(
    learner: Learners, runs_dir: Path
) -> None:
    donor = Donor(runs_dir)
    donor.teach(0, weights(1))
    job = learner()
    donor.teach(1, weights(2))
    assert job.receiver._lessons is not None
    found = job.receiver._lessons.teachers
    while (offer := found.poll()) is None:
        pass
    found.at_work = frozenset()  # as where its donor has not ended yet
    found.begin(offer)
    found.take()
    assert job.versions() == {"donor": 10}
    found.at_work = frozenset({HEAD})
    job.steps_until(lambda: job.versions() == {"donor": 20})


def test_that_bad_weights_leave_the_old_teacher(learner: Learners, runs_dir: Path) -> None:
    donor = Donor(runs_dir)
    donor.teach(0, weights(1))
    donor.teach(1, weights(2))
    donor.damage(1)  # before the start: the one before it will do
    job = learner()
    assert (job.versions(), donor.reason(1)) == ({"donor": 10}, "truncated")
    bad: list[tuple[str, dict[str, Any]]] = [
        ("alien", {"run_id": "another"}),
        ("alien", {"kind": "gradient"}),
        ("schema", {"head": "heads.h1"}),
    ]
    for sequence, (reason, changes) in enumerate(bad, start=2):
        donor.teach(sequence, weights(3), **changes)
        job.steps_until(partial(donor.reason, sequence))
        assert donor.reason(sequence) == reason
    tensors = weights(3)
    tensors["heads.h2.bias"][0] = torch.nan
    donor.teach(5, tensors)
    job.steps_until(lambda: donor.reason(5))
    assert donor.reason(5) == "nonfinite"
    assert (job.versions(), job.receiver.taught_heads) == ({"donor": 10}, (HEAD,))
    donor.teach(6, weights(4))
    job.steps_until(lambda: job.versions() == {"donor": 70})


def test_that_weights_of_another_shape_are_refused_at_the_start(
    learner: Learners, runs_dir: Path
) -> None:
    donor = Donor(runs_dir)
    tensors = weights(1)
    tensors["backbone.0.weight"] = torch.zeros(9, 6, dtype=torch.float64)
    del tensors["heads.h2.bias"]
    donor.teach(0, tensors)
    lines = r"backbone\.0\.weight: .* \(8, 6\), donor float64 \(9, 6\)\n.*h2\.bias: .* donor absent"
    with pytest.raises(SchemaMismatchError, match=lines):
        learner()


def test_that_weights_of_another_shape_do_not_end_a_job_that_trains(
    learner: Learners, runs_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    donor = Donor(runs_dir)
    donor.teach(0, weights(1))
    job = learner()
    donor.teach(1, {**weights(2), "backbone.extra": torch.zeros(2)})
    job.steps_until(lambda: donor.reason(1))
    assert donor.reason(1) == "schema"
    assert "backbone.extra: this teacher absent, donor float32 (2,)" in caplog.text
    assert job.versions() == {"donor": 10}


class Wide(nn.Module):
    """A donor's model of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 11), nn.Dropout(0.5), nn.Tanh())
        self.heads = nn.ModuleDict({"h2": nn.Linear(11, 4)})
        self.double()

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.heads["h2"](self.backbone(features))
        return logits


def test_a_teacher_of_another_shape(learner: Learners, runs_dir: Path) -> None:
    torch.manual_seed(5)
    wide = Wide().eval()
    Donor(runs_dir).teach(0, dict(wide.state_dict()))
    state: list[Tensor] = []

    def factory() -> nn.Module:
        state.append(torch.get_rng_state())
        return Wide()

    job = learner(teacher_factory=factory, settings={"distill_loss": "mse"})
    with torch.no_grad():
        expected = F.mse_loss(job.logits(), wide(job.features))
    torch.testing.assert_close(
        job.receiver.teacher_loss(job.logits(), job.features).detach(), expected
    )
    assert torch.equal(torch.get_rng_state(), state[0]), "the factory has moved the random state"


def test_that_a_factory_of_no_use_is_refused_before_a_run_is_claimed(
    learner: Learners, runs_dir: Path
) -> None:
    lines = r"backbone and heads\.h2; these differ:\n  backbone\.0\.bias: this teacher .* \(11,\)"
    with pytest.raises(ValueError, match=lines):
        learner({"exchange": "auto"}, teacher_factory=Wide)
    with pytest.raises(ValueError, match="exchange 'gradient' has no teacher: leave"):
        learner({"exchange": "gradient"}, teacher_factory=Wide)
    assert not runs_dir.exists(), "a corrected start finds its place free"


class Tricky(nn.Module):
    """Batch normalisation, dropout, and a weight that backbone and head share with nobody else."""

    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        second.weight = first.weight
        norm = nn.BatchNorm1d(4)
        self.backbone = nn.Sequential(first, norm, nn.Dropout(0.5), second)
        self.heads = nn.ModuleDict({"h1": nn.Linear(4, 2), "h2": nn.Linear(4, 3)})


def test_that_a_copied_teacher_is_in_eval_mode_and_leaves_the_student_alone() -> None:
    reset()
    torch.manual_seed(0)
    model, trained = Tricky(), Tricky()
    trained.backbone(torch.randn(50, 4))  # moves the statistics
    shared = shared_parameters(model, "backbone", ["heads.h1", HEAD])
    teacher = copy_teacher(Accelerator(cpu=True), model, shared, "backbone", HEAD)
    of_donor = shared_parameters(trained, "backbone", [HEAD]).weights
    assert set(teacher.tensors) == set(of_donor)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    teacher.copy_(of_donor)
    inputs = torch.randn(7, 4)
    with torch.no_grad():
        trained.eval()
        expected = trained.heads["h2"](trained.backbone(inputs))
    for _ in range(2):
        assert torch.equal(teacher(inputs), expected)
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not teacher(inputs).requires_grad


def test_that_modules_without_copies_need_a_factory(learner: Learners) -> None:
    class Uncopyable(nn.Linear):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise TypeError("no")

    reset()
    model = Tricky()
    model.heads["h2"] = Uncopyable(4, 3)
    shared = shared_parameters(model, "backbone", [HEAD])
    with pytest.raises(BridgeError, match=r"cannot be copied for a teacher \(no\).*factory"):
        copy_teacher(Accelerator(cpu=True), model, shared, "backbone", HEAD)
