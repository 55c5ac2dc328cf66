"""A receiver in one process whose teacher's records are written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.oracle import Case, build_network
from tests.unit.teaching import HEAD, Donor, Learners, weights
from toolkit import PeerError


@pytest.mark.parametrize("settings", [{}, {"run": "0001"}], ids=["newest", "named"])
def test_that_a_donor_that_has_ended_teaches(
    learner: Learners, runs_dir: Path, settings: dict[str, Any]
) -> None:
    donor = Donor(runs_dir)
    donor.teach(0, weights(1))
    donor.teach(1, weights(2))
    donor.end()
    job = learner(settings)
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
    learner: Learners, caplog: pytest.LogCaptureFixture, runs_dir: Path
) -> None:
    job = learner({"peer_wait": 0.2})
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


def test_that_a_head_rests_again_when_its_teacher_does(learner: Learners, runs_dir: Path) -> None:
    Donor(runs_dir).teach(0, weights(1))
    job = learner()
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


def test_that_two_donors_of_a_head_count_for_equal_parts(learner: Learners, runs_dir: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        Donor(runs_dir, name).teach(0, weights(seed))
    settings = {"num_donors": 2, "donor_weight": 0.5, "distill_loss": "mse"}
    job = learner({**settings, "loss_reduction": "sum"})
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


def test_a_loss_of_the_users_own(learner: Learners, runs_dir: Path) -> None:
    Donor(runs_dir).teach(0, weights(1))
    job = learner(teacher_loss_fn=lambda student, teacher: (student - teacher).abs().mean())
    with torch.no_grad():
        target = build_network(Case(seed=1), ("h2",))(job.features, "h2")
    loss = job.receiver.teacher_loss(job.logits(), job.features)
    torch.testing.assert_close(loss, (job.logits() - target).abs().mean())


def test_that_a_checkpoint_says_who_taught_and_a_resume_takes_the_newest(
    learner: Learners, runs_dir: Path, tmp_path: Path
) -> None:
    donor = Donor(runs_dir)
    donor.teach(0, weights(1))
    job = learner()
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
    again = learner({"resume_from_checkpoint": checkpoint})
    again.accelerator.load_state(str(checkpoint))
    assert again.receiver.completed_steps == 3
    assert again.versions() == {"donor": 20}
    assert torch.equal(again.network.get_parameter("heads.h2.weight"), weight)
    again.step()
    assert again.receiver.metrics["bridge/teacher age donor (receiver steps)"] == 0.0


def test_that_a_missing_teacher_is_an_error_if_required(learner: Learners) -> None:
    with pytest.raises(PeerError, match=r"did not come for 0\.2 s.*waited for a teacher"):
        learner({"require_peer": True, "peer_wait": 0.2})


def test_that_an_exchange_without_teachers_has_no_loss_of_theirs(learner: Learners) -> None:
    with pytest.raises(RuntimeError, match="exchange 'gradient' has no teachers"):
        learner({"exchange": "gradient"}).receiver.teacher_loss(torch.zeros(2, 3))
