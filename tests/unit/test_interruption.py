"""Signals as a wish to end after the present step."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.oracle import Case, build_dataset
from tests.unit.jobs import DonorAlone, ReceiverAlone
from toolkit.bridge import interruption as interruption_module
from toolkit.bridge.errors import Interrupted
from toolkit.bridge.interruption import SIGNALS, Interruption

pytestmark = pytest.mark.usefixtures("fresh_state")


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    after = [signal.getsignal(number) for number in SIGNALS]
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)
    assert after == before, "a handler was left behind"


def get(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_that_the_first_signal_is_a_wish_and_a_later_one_ends(
    number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    interruption = Interruption()
    interruption.catch()
    assert (interruption.signal, interruption.seconds) == (0, 0.0)
    get(number)
    get(signal.SIGTERM)  # a launcher that passes it on
    assert interruption.signal == number
    assert caplog.text.count("ending after this step") == 1
    monkeypatch.setattr(interruption_module, "SAME_WISH_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        get(signal.SIGINT)
    interruption.release()


def receiver_alone(tmp_path: Path) -> ReceiverAlone:
    job = ReceiverAlone(tmp_path, exchange="gradient")
    job.receiver.config.peer_wait = 1000.0
    return job


def test_that_a_receiver_finishes_its_step(tmp_path: Path) -> None:
    job = receiver_alone(tmp_path)
    with job.receiver, job.receiver.interruptible():
        job.backward()
        job.donate(job.constant(0.1))
        get(signal.SIGTERM)
        wishes = [job.receiver.stop_signal]  # which changes between two steps only
        job.receiver.inject()
        job.optimizer.step()
        assert job.receiver.commit()
        assert [*wishes, job.receiver.stop_signal] == [0, signal.SIGTERM]
        assert job.receiver.fates()["applied"] == 1
        interruption = job.receiver._waiting.interruption
    assert signal.getsignal(signal.SIGTERM) != interruption._handle


def test_that_a_rank_that_knows_of_a_signal_before_it_comes_saves_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = receiver_alone(tmp_path)

    def vote() -> None:
        job.receiver.stop_signal = signal.SIGTERM

    monkeypatch.setattr(job.receiver, "_vote_to_stop", vote)
    with job.receiver:
        with job.receiver.interruptible():
            job.backward()
            job.donate(job.constant(0.1))
            job.receiver.inject()
            job.optimizer.step()
            job.receiver.commit()
        get(signal.SIGTERM)
    assert job.receiver._waiting.interruption.signal == signal.SIGTERM


def test_that_a_wait_for_a_donor_is_broken_off_and_the_step_has_not_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.bridge.collector.GRACE_SECONDS", 0.05)
    job = receiver_alone(tmp_path)
    with job.receiver:
        with job.receiver.interruptible():
            job.backward()
            get(signal.SIGINT)
            job.receiver.inject()
            pytest.fail("the donor is not there")
        assert job.receiver.stop_signal == signal.SIGINT
        assert (job.receiver.completed_steps, job.receiver.completed_windows) == (0, 0)
        job.accelerator.save_state(str(tmp_path / "checkpoint"))
    assert job.receiver.steps_alone == 0


def test_that_a_donor_that_ends_by_the_same_signal_costs_no_step_alone(tmp_path: Path) -> None:
    job = receiver_alone(tmp_path)
    with job.receiver, job.receiver.interruptible():
        job.backward()
        job.donate(None, kind="end")
        get(signal.SIGTERM)
        job.receiver.inject()
        pytest.fail("a step without the donor's part")
    assert job.receiver.stop_signal == signal.SIGTERM
    assert job.receiver.completed_steps == 0


def test_that_an_exchange_of_deltas_that_is_broken_off_is_no_place_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.bridge.collector.GRACE_SECONDS", 0.05)
    job = ReceiverAlone(tmp_path, exchange="delta", local_steps=2)
    job.receiver.config.peer_wait = 1000.0
    with job.receiver:
        with job.receiver.interruptible():
            assert job.step()
            get(signal.SIGTERM)
            job.step()
            pytest.fail("the donor is not there")
        assert job.receiver.completed_steps == 2
        with pytest.raises(RuntimeError, match="step 2 would lose the donors' local steps"):
            job.accelerator.save_state(str(tmp_path / "checkpoint"))


def loader(job: DonorAlone) -> DataLoader[tuple[Tensor, ...]]:
    plain = DataLoader(build_dataset(Case(), "h2"), batch_size=9)
    prepared: DataLoader[tuple[Tensor, ...]] = job.accelerator.prepare(plain)
    return prepared


def test_that_a_donor_that_waits_ends_at_once(tmp_path: Path) -> None:
    job = DonorAlone(tmp_path, exchange="gradient")
    job.donor.config.peer_wait = 1000.0
    with job.donor, job.donor.interruptible():
        # Between the vote and the wait.
        job.donor._waiting.interruption._handle(signal.SIGINT, None)
        job.donor._vote_to_stop = lambda: None  # type: ignore[method-assign]
        next(job.donor.follow(loader(job)))
        pytest.fail("there is no receiver")
    assert (job.donor.stop_signal, job.donor.completed_windows) == (signal.SIGINT, 0)


@pytest.mark.parametrize("exchange", ["gradient", "distill", "head"])
def test_that_a_donor_ends_between_two_windows(tmp_path: Path, exchange: str) -> None:
    job = DonorAlone(tmp_path, exchange=exchange)
    job.publish_weights(step=0, fill=0.5)
    with job.donor as donor, donor.interruptible():
        for inputs, labels in donor.follow(loader(job)):
            get(signal.SIGTERM)
            with job.accelerator.accumulate(job.model):
                loss = F.cross_entropy(job.model(inputs, "h2"), labels)
                donor.backward(loss, len(labels))
                assert donor.publish() == (exchange == "gradient")
                job.optimizer.step()
                job.optimizer.zero_grad()
    assert (donor.stop_signal, donor.completed_windows) == (signal.SIGTERM, 1)
    kinds = [job.payload(number).header.kind for number in donor.transport.sequences("donor")]
    assert kinds[-1] == "end", "the receiver is told"


def test_that_the_error_crosses_from_rank_to_rank() -> None:
    assert pickle.loads(pickle.dumps(Interrupted(signal.SIGTERM))).signal == signal.SIGTERM
