"""Where gradients may come late, no window of a donor waits for the disk."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.oracle import Case, build_dataset
from tests.unit.gates import PATIENCE_SECONDS, Gate
from tests.unit.jobs import DonorAlone, ReceiverAlone, reset, same_tensors
from toolkit.bridge.agreement import read_claim
from toolkit.bridge.errors import DiskError
from toolkit.bridge.transport import DirectoryTransport


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
        donor._waiting.catch_up()
        held.close()
        assert donor.publish()
        assert len(donor.transport.sequences("donor")) == number - 1, "nobody waited for the disk"
        for grad in grads.values():
            grad.zero_()  # as DDP does, whose buckets they may be
        if number == 2:
            donor.transport.reject("donor", 0, "digest", "for this test")
            assert donor._poll() is None, "it answered other weights than these"
        held.open()
        if number == 2:
            break
        job.publish_weights(1, 0.02)
    record = job.payload(1)
    assert (record.header.receiver_step, record.header.donor_step) == (1, 2)
    assert same_tensors(record.tensors, sums[1])
    staged = list(donor._sums._staged)
    assert staged == list(sums[1]), "they were staged, in the same memory each time"
    donor.close()


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_that_the_receiver_says_whether_a_step_waits(tmp_path: Path, max_staleness: int) -> None:
    reset()
    job = ReceiverAlone(tmp_path / "runs", run="one", max_staleness=max_staleness)
    job.backward()
    job.receiver._waiting.catch_up()
    other = DonorAlone(tmp_path / "runs", run="one")
    loader = other.accelerator.prepare(DataLoader(build_dataset(Case(), "h2"), batch_size=4))
    next(other.donor.follow(loader))
    assert other.donor._writes_behind == (max_staleness > 0)
    assert (other.donor._reading._prefetch is None) == (max_staleness == 0)
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
    assert job.donor._waiting.background.join(PATIENCE_SECONDS)
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
