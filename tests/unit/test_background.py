"""Where gradients may come late, no step of a receiver waits for the disk; nothing is lost."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.unit.gates import PATIENCE_SECONDS, Gate
from tests.unit.jobs import ReceiverAlone, look_once, reset, same_tensors
from toolkit.bridge.background import Background
from toolkit.bridge.errors import DiskError
from toolkit.bridge.payload import Record
from toolkit.bridge.transport import DirectoryTransport


def weights(job: ReceiverAlone) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in job.receiver.shared.weights.items()}


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
    assert not same_tensors(weights(job), committed)
    held.open()

    record = job.weights_record()
    assert record.header.receiver_step == 1
    assert same_tensors(record.tensors, committed)
    assert record.header.weights_digest == record.header.tensors_digest
    job.receiver.commit()
    job.receiver.close()
    assert [r.header.receiver_step for r in records(job, "receiver")][-2:] == [2, 2]  # and the end


def records(job: ReceiverAlone, stream: str) -> list[Record]:
    transport = job.receiver.transport
    return [job.receiver._reading.read(stream, number) for number in transport.sequences(stream)]


def test_that_the_digest_is_known_before_the_weights_can_be_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = receiver(tmp_path)
    known: list[bool] = []
    publish = DirectoryTransport.publish

    def looking(transport: DirectoryTransport, stream: str, *args: Any) -> int:
        size = publish(transport, stream, *args)
        if stream == "receiver":
            digests = job.receiver._collector.on_main.state()["digests"]
            known.append(job.receiver.completed_steps in digests)
        return size

    monkeypatch.setattr(DirectoryTransport, "publish", looking)
    finish_step(job)
    job.backward()
    job.donate(job.constant(1.0))
    finish_step(job)
    job.receiver._waiting.catch_up()
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
    assert job.receiver._waiting.background.join(PATIENCE_SECONDS)
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
    assert not same_tensors(weights(job), published)
    job.receiver.transport.reject("receiver", 0, "digest", "for this test")
    job.receiver._collector.on_main.begin()
    look_once(job.receiver)
    record = job.weights_record()
    assert (record.header.sequence, record.header.receiver_step) == (1, 0)
    assert same_tensors(record.tensors, published)
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
    assert not job.receiver._waiting.background.is_busy
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


# -- the thread -----------------------------------------------------------------------------------


def test_that_an_error_is_raised_once() -> None:
    background = Background()
    assert background.check()
    background.start(lambda: 1 / 0)
    assert background.join(PATIENCE_SECONDS)
    with pytest.raises(ZeroDivisionError):
        background.check()
    assert background.check()
