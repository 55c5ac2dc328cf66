"""Where gradients may come late, no step waits for the disk, and nothing is lost or mixed."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.oracle import Case, build_dataset
from tests.unit.jobs import DonorAlone, ReceiverAlone, reset
from toolkit.bridge.agreement import read_claim
from toolkit.bridge.background import Background
from toolkit.bridge.errors import DiskError
from toolkit.bridge.payload import Record
from toolkit.bridge.transport import DirectoryTransport

PATIENCE_SECONDS = 30.0  # of this test, where something hangs


class Gate:
    """Holds the publishing of one stream up while it is closed; counts what goes through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stream: str) -> None:
        self._open = threading.Event()
        self._open.set()
        self.error: OSError | None = None
        self.has_failed = threading.Event()
        publish = DirectoryTransport.publish

        def held(transport: DirectoryTransport, job: str, *args: Any) -> int:
            if job == stream:
                assert self._open.wait(PATIENCE_SECONDS)
                if self.error is not None:
                    self.has_failed.set()
                    raise self.error
            return publish(transport, job, *args)

        monkeypatch.setattr(DirectoryTransport, "publish", held)

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Gate]]:
    gates: list[Gate] = []

    def build(stream: str) -> Gate:
        gates.append(Gate(monkeypatch, stream))
        return gates[-1]

    yield build
    for each in gates:
        each.open()
    reset()


def weights(job: ReceiverAlone) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in job.receiver.shared.weights.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def receiver(tmp_path: Path, **settings: Any) -> ReceiverAlone:
    """One whose first weights are out, and answered."""
    reset()
    job = ReceiverAlone(tmp_path / "runs", max_staleness=2, **settings)
    job.backward()
    job.donate(job.constant(1.0))
    return job


def finish_step(job: ReceiverAlone) -> bool:
    job.receiver.inject()
    job.optimizer.step()
    job.optimizer.zero_grad()
    return job.receiver.commit()


# -- the receiver ---------------------------------------------------------------------------------


def test_that_steps_go_on_while_weights_are_written(
    tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    """What is written then is what was committed, though the model has changed meanwhile."""
    job = receiver(tmp_path)
    held = gate("receiver")
    held.close()
    assert finish_step(job)
    committed = weights(job)
    assert job.receiver.transport.sequences("receiver") == [0], "nobody waited for the disk"
    job.backward()
    job.receiver.inject()
    job.optimizer.step()
    assert not same(weights(job), committed)
    held.open()

    record = job.weights_record()
    assert record.header.receiver_step == 1
    assert same(record.tensors, committed)
    assert record.header.weights_digest == record.header.tensors_digest
    job.receiver.commit()
    job.receiver.close()
    assert [r.header.receiver_step for r in records(job, "receiver")][-2:] == [2, 2]  # and the end


def records(job: ReceiverAlone, stream: str) -> list[Record]:
    transport = job.receiver.transport
    return [job.receiver._read(stream, number) for number in transport.sequences(stream)]


def test_that_the_digest_is_known_before_the_weights_can_be_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = receiver(tmp_path)
    known: list[bool] = []
    publish = DirectoryTransport.publish

    def looking(transport: DirectoryTransport, stream: str, *args: Any) -> int:
        size = publish(transport, stream, *args)
        if stream == "receiver":
            known.append(job.receiver.completed_steps in job.receiver._on_main.state()["digests"])
        return size

    monkeypatch.setattr(DirectoryTransport, "publish", looking)
    finish_step(job)
    job.backward()
    job.donate(job.constant(1.0))
    finish_step(job)
    job.receiver._catch_up()
    assert known == [True, True]
    job.receiver.close()


def test_that_a_checkpoint_waits_for_the_weights(
    tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    job = receiver(tmp_path)
    held = gate("receiver")
    held.close()
    finish_step(job)
    opener = threading.Timer(0.2, held.open)
    opener.start()
    job.accelerator.save_state(str(tmp_path / "checkpoint"))
    assert job.receiver.transport.sequences("receiver") == [0, 1]
    opener.join()
    job.receiver.close()


def test_that_a_disk_that_fails_for_good_ends_the_next_step(
    tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    job = receiver(tmp_path)
    held = gate("receiver")
    held.error = OSError(errno.ENOSPC, "No space left on device")
    assert finish_step(job), "this step is done"
    assert job.receiver._background.join(PATIENCE_SECONDS)
    job.backward()
    with pytest.raises(DiskError, match="the disk has failed for 0"):
        job.receiver.inject()
    held.error = None
    job.receiver.close()


def test_that_a_short_outage_loses_nothing(tmp_path: Path, gate: Callable[[str], Gate]) -> None:
    job = receiver(tmp_path, peer_wait=PATIENCE_SECONDS)
    held = gate("receiver")
    held.error = OSError(errno.EIO, "Input/output error")
    finish_step(job)
    assert held.has_failed.wait(PATIENCE_SECONDS)
    held.error = None
    assert job.weights_record().header.receiver_step == 1
    job.receiver.close()


def test_that_weights_asked_for_again_are_those_of_the_exchange(tmp_path: Path) -> None:
    """Exchange ``delta``: local steps have changed the model since they were published."""
    reset()
    job = ReceiverAlone(tmp_path / "runs", exchange="delta", local_steps=2)
    job.backward()
    published = weights(job)
    finish_step(job)
    assert not same(weights(job), published)
    job.receiver.transport.reject("receiver", 0, "digest", "for this test")
    job.receiver._on_main.begin()
    job.receiver._poll()
    record = job.weights_record()
    assert (record.header.sequence, record.header.receiver_step) == (1, 0)
    assert same(record.tensors, published)
    job.receiver.close()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_that_an_error_waits_for_what_is_written(
    tmp_path: Path, gate: Callable[[str], Gate], error: type[BaseException]
) -> None:
    job = receiver(tmp_path)
    held = gate("receiver")
    held.close()
    opener = threading.Timer(0.2, held.open)

    def fail() -> None:
        with job.receiver:
            finish_step(job)
            opener.start()
            raise error

    with pytest.raises(error):
        fail()
    assert not job.receiver._background.is_busy
    kinds = [record.header.kind for record in records(job, "receiver")]
    assert kinds == ["weights", "weights", *(["end"] if error is KeyboardInterrupt else [])]
    opener.join()


def test_that_an_error_does_not_hide_a_write_that_failed(
    tmp_path: Path, gate: Callable[[str], Gate], caplog: pytest.LogCaptureFixture
) -> None:
    job = receiver(tmp_path)
    held = gate("receiver")
    held.error = OSError(errno.ENOSPC, "No space left on device")

    def fail() -> None:
        with job.receiver:
            finish_step(job)
            raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        fail()
    assert "the newest record of the receiver is not written: the disk has failed" in caplog.text


# -- the donor ------------------------------------------------------------------------------------


def test_that_windows_go_on_while_a_payload_is_written(
    tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    reset()
    job = DonorAlone(tmp_path / "runs", max_staleness=1)
    donor = job.donor
    job.publish_weights(0, 0.01)
    loader = job.accelerator.prepare(DataLoader(build_dataset(Case(), "h2"), batch_size=4))
    held = gate("donor")
    sums = []
    for number, (inputs, targets) in enumerate(donor.follow(loader), 1):
        donor.backward(F.cross_entropy(job.network(inputs, "h2"), targets), len(targets))
        shared = donor._gradient_parameters("heads.h2")
        grads = {n: p.grad for n, p in shared.items() if p.grad is not None}
        sums.append({name: grad.clone() for name, grad in grads.items()})
        donor._catch_up()
        held.close()
        assert donor.publish()
        assert len(donor.transport.sequences("donor")) == number - 1, "nobody waited for the disk"
        for grad in grads.values():
            grad.zero_()  # as DDP does, whose buckets they may be
        if number == 2:
            donor.transport.reject("donor", 0, "digest", "for this test")
            assert donor._look() is None, "it answered other weights than these"
        held.open()
        if number == 2:
            break
        job.publish_weights(1, 0.02)
    record = job.payload(1)
    assert (record.header.receiver_step, record.header.donor_step) == (1, 2)
    assert same(record.tensors, sums[1])
    assert list(donor._staged) == list(sums[1]), "they were staged, in the same memory each time"
    donor.close()


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_that_the_receiver_says_whether_a_step_waits(tmp_path: Path, max_staleness: int) -> None:
    reset()
    job = ReceiverAlone(tmp_path / "runs", run="one", max_staleness=max_staleness)
    job.backward()
    job.receiver._catch_up()
    other = DonorAlone(tmp_path / "runs", run="one")
    loader = other.accelerator.prepare(DataLoader(build_dataset(Case(), "h2"), batch_size=4))
    next(other.donor.follow(loader))
    assert other.donor._writes_behind == (max_staleness > 0)
    assert (other.donor._prefetch is None) == (max_staleness == 0)
    other.donor._stop()
    job.receiver._stop()
    reset()


def test_that_a_donor_that_is_alone_is_told_of_a_write_that_failed(
    tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    """And not at its end, where it would cost the weights that it has trained since."""
    reset()
    job = DonorAlone(tmp_path / "runs", max_staleness=1)
    job.publish_weights(0, 0.01)
    loader = job.accelerator.prepare(DataLoader(build_dataset(Case(), "h2"), batch_size=4))
    batches = job.donor.follow(loader)
    held = gate("donor")
    held.close()
    for follows in (True, False):
        inputs, targets = next(batches)
        job.donor.backward(F.cross_entropy(job.network(inputs, "h2"), targets), len(targets))
        assert job.donor.publish() == follows
    held.error = OSError(errno.ENOSPC, "No space left on device")
    held.open()
    assert job.donor._background.join(PATIENCE_SECONDS)
    with pytest.raises(DiskError, match="No space left"):
        next(batches)
    held.error = None
    job.donor.close()
    assert job.donor.transport.sequences("donor.weights") == [0]


def test_that_the_claim_is_read_once_the_disk_lets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reset()
    job = DonorAlone(tmp_path / "runs")
    job.publish_weights(0, 0.01)
    errors = [OSError(errno.EIO, "Input/output error")]

    def failing(transport: DirectoryTransport, name: str) -> dict[str, Any] | None:
        if job.donor._weights is not None and errors:
            raise errors.pop()
        return read_claim(transport, name)

    monkeypatch.setattr("toolkit.bridge.donor.read_claim", failing)
    loader = job.accelerator.prepare(DataLoader(build_dataset(Case(), "h2"), batch_size=4))
    assert next(job.donor.follow(loader))
    assert not errors
    job.donor._stop()
    reset()


# -- the thread -----------------------------------------------------------------------------------


def test_that_an_error_is_raised_once() -> None:
    background = Background()
    assert background.check()
    background.start(lambda: 1 / 0)
    assert background.join(PATIENCE_SECONDS)
    with pytest.raises(ZeroDivisionError):
        background.check()
    assert background.check()
