"""Exchange ``auto``: gradients while a donor lives, a teacher while none does."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.oracle import Case, build_network
from tests.unit.jobs import ReceiverAlone, StartReceiver, batches, reset
from toolkit import BridgeError
from toolkit.bridge import liveness, runs
from toolkit.bridge import receiver as receiver_module
from toolkit.bridge import teachers as teachers_module
from toolkit.bridge.digests import digest_tensors
from toolkit.bridge.donors import Donors
from toolkit.bridge.liveness import STALL_FACTOR, PeerWatch
from toolkit.bridge.payload import write_record

pytestmark = pytest.mark.usefixtures("fresh_state")

HEAD = "heads.h2"
MARK = "events/teacher heads.h2 (0 or 1)"


@pytest.fixture
def start(start_receiver: StartReceiver) -> StartReceiver:
    return partial(start_receiver, exchange="auto")


def step(job: ReceiverAlone, donates: bool = False, asks: bool = True) -> float | None:
    """One step, for which the donor has a gradient or not; what the teacher's loss was.

    ``asks``: whether the loop knows of teachers.
    """
    inputs, labels = next(batches("h1", [7]))
    receiver, loss_of_teacher = job.receiver, None
    with job.accelerator.accumulate(job.model):
        loss = F.cross_entropy(job.network(inputs, "h1"), labels)
        if asks and HEAD in receiver.taught_heads:
            part = receiver.teacher_loss(job.network(inputs, "h2"), inputs)
            loss_of_teacher = float(part.detach())
            loss = loss + part
        receiver.backward(loss, num_samples=len(labels))
        if donates:
            job.donate(job.constant(0.1))
        receiver.inject()
        job.optimizer.step()
        job.optimizer.zero_grad()
        assert receiver.commit()
    return loss_of_teacher


def test_that_a_teacher_stands_in_for_a_donor_that_ended_until_it_is_back(
    start: StartReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    job = start()
    assert [step(job, donates=True) for _ in range(3)] == [None] * 3
    job.donate(None, kind="end")
    assert step(job) is None, "the end is read in this step"
    assert job.receiver.taught_heads == (HEAD,)
    assert "from receiver step 4 on heads.h2 learns from a teacher" in caplog.text

    before = job.network.get_parameter("heads.h2.weight").detach().clone()
    losses = [step(job) for _ in range(6)]
    assert losses[0] == pytest.approx(0.0, abs=1e-12), "no spike: it says what the head says"
    assert all(loss is not None and loss > 0 for loss in losses[1:]), "the backbone has moved"
    assert not torch.equal(job.network.get_parameter("heads.h2.weight"), before)
    assert job.receiver.steps_alone == 1
    assert job.receiver.metrics[MARK] == 1.0

    job.receiver.transport.beat("donor", 1)  # it is back, and weights are published for it
    assert step(job) is not None
    job.donate(job.constant(0.1))
    assert step(job) is not None, "the next step takes its gradient"
    assert not job.receiver.taught_heads
    assert not job.network.get_parameter("heads.h2.weight").requires_grad
    assert step(job, donates=True) is None
    assert job.receiver.metrics[MARK] == 0.0
    fates = job.receiver.fates()
    assert (fates["applied"], fates["dropped"]) == (4, 1), "an answer to weights that are past"


def test_that_nothing_teaches_a_head_that_was_never_trained(start: StartReceiver) -> None:
    job = start()
    job.receiver.transport.open_stream("donor")
    assert step(job) is None  # given up
    assert step(job) is None
    assert job.receiver.taught_heads == ()
    assert job.receiver.steps_alone == 2


def test_that_the_teacher_is_the_receiver_as_it_was(start: StartReceiver) -> None:
    job = start(donor_weight=0.7, temperature=1.0)
    step(job, donates=True)
    job.donate(None, kind="end")
    step(job)
    inputs, _ = next(batches("h1", [7]))
    with torch.no_grad():
        memory = F.log_softmax(job.network(inputs, "h2"), dim=-1)
    step(job)
    with torch.no_grad():
        student = F.log_softmax(job.network(inputs, "h2"), dim=-1)
        expected = 0.7 * F.kl_div(student, memory, log_target=True, reduction="batchmean")
    assert step(job) == pytest.approx(float(expected), rel=1e-12)


def test_that_a_donor_that_leaves_again_leaves_a_new_memory(start: StartReceiver) -> None:
    job = start()
    for _ in range(2):
        step(job, donates=True)
        job.donate(None, kind="end")
        assert step(job) is None
        assert step(job) == pytest.approx(0.0, abs=1e-12), "the head as it is now, not as it was"
        for _ in range(3):
            assert step(job)
        job.receiver.transport.beat("donor", job.receiver.completed_steps)
        step(job)
        job.donate(job.constant(0.1))
        step(job)
        assert not job.receiver.taught_heads


def test_that_a_loop_without_teachers_trains_alone_and_says_so(
    start: StartReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    job = start()
    step(job, donates=True, asks=False)
    job.donate(None, kind="end")
    for _ in range(3):
        step(job, asks=False)
    assert (job.receiver.steps_alone, job.receiver.steps_taught) == (3, 0)
    assert job.receiver.taught_heads == ()
    assert not job.network.get_parameter("heads.h2.weight").requires_grad
    assert "the training loop does not add receiver.teacher_loss()" in caplog.text


def test_that_a_model_without_copies_goes_on_alone(
    start: StartReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    job = start()
    step(job, donates=True)
    hidden = next(job.network.backbone.parameters()) * 1.0  # no leaf, and no copy of it
    job.network.backbone.register_buffer("hidden", hidden, persistent=False)
    job.donate(None, kind="end")
    for _ in range(3):
        assert step(job) is None
    assert job.receiver.steps_alone == 3
    assert "cannot be copied for a teacher" in caplog.text


class Flaky:
    """Makes as many teachers as the start needs, and then no more."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self) -> nn.Module:
        if not self.left:
            raise ValueError("no memory is left")
        self.left -= 1
        return build_network(Case(dtype="float64"), ("h2",))


def test_that_a_factory_that_fails_later_leaves_the_receiver_alone(
    start: StartReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    job = start(teacher_factory=Flaky(1))
    step(job, donates=True)
    job.donate(None, kind="end")
    assert [step(job) for _ in range(3)] == [None] * 3
    assert (job.receiver.steps_alone, job.receiver.steps_taught) == (3, 0)
    assert not job.network.get_parameter("heads.h2.weight").requires_grad
    assert "stands in for donors that are away: no memory is left" in caplog.text


@pytest.mark.parametrize(
    "settings", [{"keep_payloads": True}, {"scope": "head"}, {"aggregate": "pcgrad"}], ids=str
)
def test_where_no_teacher_can_stand_in(
    start: StartReceiver,
    settings: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    job = start(**settings)
    assert "no teacher will stand in for a donor that goes away" in caplog.text
    step(job, donates=True)
    job.donate(None, kind="end")
    assert step(job) is None
    assert step(job) is None
    assert job.receiver.taught_heads == ()
    assert job.receiver.steps_alone == 2
    assert job.receiver.fates()["applied"] == 1


def test_that_the_end_of_a_donor_that_is_away_changes_nothing(start: StartReceiver) -> None:
    job = start()
    step(job, donates=True)
    step(job)  # given up
    assert step(job) == pytest.approx(0.0, abs=1e-12)
    job.donate(None, kind="end")
    losses = [step(job) for _ in range(3)]
    assert all(losses), "the same teacher, and not a new one of the head as it is now"
    assert (job.receiver.steps_alone, job.receiver.steps_taught) == (1, 4)
    fates = job.receiver.fates()
    assert (fates["applied"], fates["pending"], fates["published"]) == (1, 0, 1)


def test_that_a_slow_donor_that_lives_is_waited_for_as_without_teachers(
    start: StartReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver_module, "SILENT_BEATS", 0.05)
    receiver, now = start().receiver, 1000.0
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(liveness, "time", clock)
    peer = PeerWatch(receiver.transport, "donor", clock.monotonic)
    peer.sign_of_life()
    wait = receiver._open_donor_wait(peer, "its gradient")
    for beat in range(1, round(STALL_FACTOR * receiver.config.peer_wait / 0.04)):
        now += 0.04
        receiver.transport.beat("donor", beat)
        assert wait.gave_up() is None, f"given up after {wait.seconds} s"
    now += 0.051
    assert wait.gave_up() == "the donor fell silent for 0.05 s"


def test_that_a_model_that_is_no_head_of_a_backbone_needs_a_factory(start: StartReceiver) -> None:
    job = start()
    step(job, donates=True)
    job.donate(None, kind="end")
    step(job)
    inputs, _ = next(batches("h1", [7]))
    with pytest.raises(BridgeError, match=r"inputs given to teacher_loss\(\): .*teacher_factory"):
        job.receiver.teacher_loss(job.network(inputs, "h2"), {"inputs": inputs})


@pytest.mark.parametrize("settings", [{}, {"require_peer": True}, {"aggregate": "pcgrad"}], ids=str)
def test_that_a_resume_waits_for_a_donor_that_ended_and_has_left_no_weights(
    start: StartReceiver,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs, "BEAT_SECONDS", 0.1)  # who is silent for 5 of them is dead
    job, checkpoint = start(**settings), tmp_path / "checkpoint"
    step(job, donates=True)
    job.accelerator.save_state(str(checkpoint))
    job.donate(None, kind="end")  # interrupted, and resumed like the receiver
    job.receiver._stop()
    reset()
    again = start(**settings, resume_from_checkpoint=checkpoint)
    again.accelerator.load_state(str(checkpoint))
    donors = again.receiver._collector.donors
    assert isinstance(donors, Donors)
    again.receiver._publish_weights()
    donors.begin()
    assert donors.look(1) is None, "no verdict without it"
    again.published = job.published
    step(again, donates=True)
    assert (again.receiver.fates()["applied"], again.receiver.steps_alone) == (2, 0)


def test_that_what_a_donor_trained_before_is_no_teacher_after_its_gradients(
    start: StartReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers_module, "LOOK_SECONDS", 0.0)
    job = start()
    transport = job.receiver.transport
    transport.open_stream("donor.weights")

    def leave_weights(sequence: int, receiver_step: int) -> None:
        weights = build_network(Case(seed=5), ("h2",)).state_dict()
        header = dataclasses.replace(
            job.weights_record().header, job="donor.weights", sequence=sequence, head=HEAD,
            receiver_step=receiver_step, weights_digest=digest_tensors(weights),
        )  # fmt: skip
        transport.publish("donor.weights", sequence, lambda p: write_record(p, header, weights))

    for _ in range(3):
        step(job, donates=True)  # at the weights of steps 0, 1, 2
    leave_weights(0, receiver_step=1)
    job.donate(None, kind="end")
    step(job)
    assert job.receiver._lessons is not None
    teachers = job.receiver._lessons.teachers
    for _ in range(3000):
        if ("donor", 0) in teachers._useless:
            break
        step(job)
        assert list(teachers.working) == [f"memory of {HEAD}"]
    leave_weights(1, receiver_step=2)  # it went on by itself from these
    for _ in range(3000):
        if list(teachers.working) == ["donor"]:
            return
        step(job)
    raise AssertionError("they were never taken")
