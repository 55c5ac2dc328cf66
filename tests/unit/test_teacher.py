"""A receiver in one process whose teacher's records are written by hand."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracle import Case, build_network
from tests.unit.jobs import reset
from tests.unit.teaching import HEAD, Donor, Receiver, weights
from toolkit import BridgeError, PeerError
from toolkit.bridge import runs, teachers
from toolkit.bridge.errors import SchemaMismatchError
from toolkit.bridge.teacher import copy_teacher
from toolkit.parameters import shared_parameters


@pytest.fixture
def runs_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(teachers, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(runs, "BEAT_SECONDS", 0.1)  # who is silent for 5 of them is dead
    return tmp_path / "runs"


@pytest.fixture
def start(runs_dir: Path) -> Iterator[Callable[..., Receiver]]:
    started: list[Receiver] = []

    def build(settings: dict[str, Any] | None = None, **keywords: Any) -> Receiver:
        started.append(Receiver(runs_dir, settings or {}, **keywords))
        return started[-1]

    yield build
    for job in started:
        job.receiver.close()
    reset()


Start = Callable[..., Receiver]


@pytest.mark.parametrize("settings", [{}, {"run": "0001"}], ids=["newest", "named"])
def test_that_a_donor_that_has_ended_teaches(
    start: Start, runs_dir: Path, settings: dict[str, Any]
) -> None:
    donor = Donor(runs_dir)
    donor.teach(0, weights(1))
    donor.teach(1, weights(2))
    donor.end()
    job = start(settings)
    assert job.receiver.run_dir.name == "0001"
    assert job.receiver.taught_heads == (HEAD,)
    assert all(p.requires_grad for p in job.network.parameters())
    with torch.no_grad():
        target = build_network(Case(seed=2), ("h2",))(job.features, "h2")
    loss = job.receiver.teacher_loss(job.logits(), job.features)
    p, q = (target / 4).softmax(1), (job.logits() / 4).softmax(1)  # the default temperature
    expected = 16 * (p * (p / q).log()).sum() / len(target)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    for _ in range(5):
        job.step()
    assert job.versions() == {"donor": 20}
    assert job.receiver.metrics["bridge/teacher age donor (receiver steps)"] == 4.0
    assert job.receiver.metrics["bridge/teacher version donor (donor steps)"] == 20.0
    assert job.receiver.steps_alone == 0
    assert job.receiver.fates()["published"] == 0  # weights are no payloads


def test_that_a_receiver_that_is_alone_trains_and_takes_a_late_teacher(
    start: Start, caplog: pytest.LogCaptureFixture, runs_dir: Path
) -> None:
    job = start({"peer_wait": 0.2})
    assert "TRAINING ALONE: the donor did not come for 0.2 s" in caplog.text
    assert job.receiver.taught_heads == ()
    before = job.network.get_parameter("heads.h2.weight").detach().clone()
    job.step()
    assert torch.equal(job.network.get_parameter("heads.h2.weight"), before)
    with pytest.raises(RuntimeError, match=r"'heads\.h2' has no teacher at work.*now \[\]"):
        job.receiver.teacher_loss(job.logits(), job.features)
    donor = Donor(runs_dir)
    donor.teach(0, weights(1))
    job.steps_until(lambda: job.receiver.taught_heads)
    assert job.receiver.steps_alone == job.receiver.completed_steps
    job.step()
    assert not torch.equal(job.network.get_parameter("heads.h2.weight"), before)
    donor.teach(1, weights(2))
    job.steps_until(lambda: job.versions() == {"donor": 20})


def test_that_a_head_rests_again_when_its_teacher_does(start: Start, runs_dir: Path) -> None:
    Donor(runs_dir).teach(0, weights(1))
    job = start()
    job.step()
    assert job.receiver._lessons is not None
    job.receiver._lessons.teachers.at_work = frozenset()
    job.step()  # a change counts from the next step on
    moved = job.network.get_parameter("heads.h2.weight").detach().clone()
    assert job.receiver.taught_heads == ()
    job.optimizer.zero_grad(set_to_none=False)
    job.step()  # AdamW's moments must not move it on
    assert torch.equal(job.network.get_parameter("heads.h2.weight"), moved)
    assert not any(p.requires_grad for p in job.network.heads["h2"].parameters())


def test_that_a_disk_that_fails_while_weights_are_looked_for_ends_no_step(
    start: Start, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = Donor(runs_dir)
    donor.teach(0, weights(1))
    job = start()
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
    start: Start, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = Donor(runs_dir)
    donor.teach(0, weights(1))
    job = start()
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
    start: Start, runs_dir: Path
) -> None:
    donor = Donor(runs_dir)
    donor.teach(0, weights(1))
    job = start()
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


def test_that_bad_weights_leave_the_old_teacher(start: Start, runs_dir: Path) -> None:
    donor = Donor(runs_dir)
    donor.teach(0, weights(1))
    donor.teach(1, weights(2))
    donor.damage(1)  # before the start: the one before it will do
    job = start()
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
    start: Start, runs_dir: Path
) -> None:
    donor = Donor(runs_dir)
    tensors = weights(1)
    tensors["backbone.0.weight"] = torch.zeros(9, 6, dtype=torch.float64)
    del tensors["heads.h2.bias"]
    donor.teach(0, tensors)
    lines = r"backbone\.0\.weight: .* \(8, 6\), donor float64 \(9, 6\)\n.*h2\.bias: .* donor absent"
    with pytest.raises(SchemaMismatchError, match=lines):
        start()


def test_that_weights_of_another_shape_do_not_end_a_job_that_trains(
    start: Start, runs_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    donor = Donor(runs_dir)
    donor.teach(0, weights(1))
    job = start()
    donor.teach(1, {**weights(2), "backbone.extra": torch.zeros(2)})
    job.steps_until(lambda: donor.reason(1))
    assert donor.reason(1) == "schema"
    assert "backbone.extra: this teacher absent, donor float32 (2,)" in caplog.text
    assert job.versions() == {"donor": 10}


def test_that_two_donors_of_a_head_count_for_equal_parts(start: Start, runs_dir: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        Donor(runs_dir, name).teach(0, weights(seed))
    settings = {"num_donors": 2, "donor_weight": 0.5, "distill_loss": "mse"}
    job = start({**settings, "loss_reduction": "sum"})
    assert job.versions() == {"one": 10, "two": 10}
    with torch.no_grad():
        targets = [build_network(Case(seed=s), ("h2",))(job.features, "h2") for s in (1, 2)]
    distances = [(job.logits() - target).square().mean(1).sum() for target in targets]
    loss = job.receiver.teacher_loss(job.logits(), job.features, head=HEAD)
    torch.testing.assert_close(loss, 0.25 * (distances[0] + distances[1]))
    own = F.cross_entropy(job.network(job.features, "h1"), job.labels).item()
    job.receiver.backward(loss, num_samples=6)  # the window has the teachers' part alone
    job.receiver.inject()
    metrics = job.receiver.metrics
    for name, distance in zip(("one", "two"), distances, strict=True):
        assert metrics[f"loss/teacher {name} (per sample)"] == pytest.approx(distance.item() / 6)
    assert metrics["loss/own (per sample)"] == pytest.approx(0.0, abs=1e-12)
    assert own > 0.1


def test_a_loss_of_the_users_own(start: Start, runs_dir: Path) -> None:
    Donor(runs_dir).teach(0, weights(1))
    job = start(teacher_loss_fn=lambda student, teacher: (student - teacher).abs().mean())
    with torch.no_grad():
        target = build_network(Case(seed=1), ("h2",))(job.features, "h2")
    loss = job.receiver.teacher_loss(job.logits(), job.features)
    torch.testing.assert_close(loss, (job.logits() - target).abs().mean())


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


def test_a_teacher_of_another_shape(start: Start, runs_dir: Path) -> None:
    torch.manual_seed(5)
    wide = Wide().eval()
    Donor(runs_dir).teach(0, dict(wide.state_dict()))
    state: list[Tensor] = []

    def factory() -> nn.Module:
        state.append(torch.get_rng_state())
        return Wide()

    job = start(teacher_factory=factory, settings={"distill_loss": "mse"})
    with torch.no_grad():
        expected = F.mse_loss(job.logits(), wide(job.features))
    torch.testing.assert_close(
        job.receiver.teacher_loss(job.logits(), job.features).detach(), expected
    )
    assert torch.equal(torch.get_rng_state(), state[0]), "the factory has moved the random state"


def test_that_a_factory_of_no_use_is_refused_before_a_run_is_claimed(
    start: Start, runs_dir: Path
) -> None:
    lines = r"backbone and heads\.h2; these differ:\n  backbone\.0\.bias: this teacher .* \(11,\)"
    with pytest.raises(ValueError, match=lines):
        start({"exchange": "auto"}, teacher_factory=Wide)
    with pytest.raises(ValueError, match="exchange 'gradient' has no teacher"):
        start({"exchange": "gradient"}, teacher_factory=Wide)
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


def test_that_modules_without_copies_need_a_factory(start: Start) -> None:
    class Uncopyable(nn.Linear):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise TypeError("no")

    reset()
    model = Tricky()
    model.heads["h2"] = Uncopyable(4, 3)
    shared = shared_parameters(model, "backbone", [HEAD])
    with pytest.raises(BridgeError, match=r"cannot be copied for a teacher \(no\).*factory"):
        copy_teacher(Accelerator(cpu=True), model, shared, "backbone", HEAD)


def test_that_a_checkpoint_says_who_taught_and_a_resume_takes_the_newest(
    start: Start, runs_dir: Path, tmp_path: Path
) -> None:
    donor = Donor(runs_dir)
    donor.teach(0, weights(1))
    job = start()
    for _ in range(3):
        job.step()
    checkpoint = tmp_path / "checkpoint"
    job.accelerator.save_state(str(checkpoint))
    content = json.loads((checkpoint / "gradient_bridge.json").read_text())
    taught = content["teachers"]["donor"]
    assert (taught["sequence"], taught["donor_step"], taught["head"]) == (0, 10, HEAD)
    weight = job.network.get_parameter("heads.h2.weight").detach().clone()
    job.receiver._stop()
    donor.teach(1, weights(2))
    again = start({"resume_from_checkpoint": checkpoint})
    again.accelerator.load_state(str(checkpoint))
    assert again.receiver.completed_steps == 3
    assert again.versions() == {"donor": 20}
    assert torch.equal(again.network.get_parameter("heads.h2.weight"), weight)
    again.step()
    assert again.receiver.metrics["bridge/teacher age donor (receiver steps)"] == 0.0


def test_that_a_missing_teacher_is_an_error_if_required(start: Start) -> None:
    with pytest.raises(PeerError, match=r"did not come for 0\.2 s.*waited for a teacher"):
        start({"require_peer": True, "peer_wait": 0.2})


def test_what_is_refused(start: Start, runs_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    with pytest.raises(ValueError, match="exchange 'gradient' has no teacher: leave"):
        start({"exchange": "gradient"}, teacher_factory=Wide)
    with pytest.raises(RuntimeError, match="exchange 'gradient' has no teachers"):
        start({"exchange": "gradient"}).receiver.teacher_loss(torch.zeros(2, 3))
