"""Jobs on a disk that fails for a while: they wait, lose nothing, and end."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.oracle import Case, build_dataset
from tests.unit.jobs import DonorAlone, ReceiverAlone, reset
from toolkit.bridge import reading as reading_module
from toolkit.bridge.errors import DiskError
from toolkit.bridge.ledger import trail_path


@contextlib.contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, num_calls: int) -> Iterator[None]:
    """So many links of records fail."""
    left, link = [num_calls], os.link

    def call(source: Any, target: Any, **options: Any) -> None:
        if "records" in str(target) and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        link(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", call)
        yield
    assert left[0] == 0 or num_calls > 1000


def test_that_a_receivers_step_waits_for_the_disk(
    tmp_path: Path,
    fresh_state: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = ReceiverAlone(tmp_path / "runs")
    with failing(monkeypatch, 2):
        job.backward()
        job.donate(job.constant(1.0))
        job.receiver.inject()
    with failing(monkeypatch, 3):
        assert job.receiver.commit()
    assert job.weights_record().header.receiver_step == 1
    assert caplog.text.count("the disk works again") == 2
    with failing(monkeypatch, 4):
        job.receiver.close()
    assert job.weights_record().header.kind == "end"


def test_that_fates_are_counted_once_the_disk_can_be_read(
    tmp_path: Path,
    fresh_state: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = ReceiverAlone(tmp_path / "runs")
    job.backward()
    job.donate(job.constant(1.0))
    job.receiver.inject()
    job.receiver.commit()
    job.receiver.close()
    listdir, left = os.listdir, [2]

    def fail(path: Any) -> list[str]:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", fail)
    assert job.receiver.fates()["applied"] == 1
    assert left == [0]
    assert "the disk works again" in caplog.text


def test_that_a_receivers_step_ends_with_the_disk(
    tmp_path: Path, fresh_state: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ReceiverAlone(tmp_path / "runs")
    with failing(monkeypatch, 10**9), pytest.raises(DiskError, match=r"for 0\.2 s"):
        job.backward()
    job.receiver._stop()


def test_that_a_donors_payload_waits_for_the_disk(
    tmp_path: Path, fresh_state: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = DonorAlone(tmp_path / "runs", exchange="gradient")
    job.donor.transport.open_stream("receiver")
    job.publish_weights(step=0, fill=0.1)
    data = job.accelerator.prepare(DataLoader(build_dataset(Case(), "h2"), batch_size=9))
    with failing(monkeypatch, 3), job.donor as donor:
        for inputs, labels in donor.follow(data, max_windows=1):
            donor.backward(F.cross_entropy(job.model(inputs, "h2"), labels), len(labels))
            assert donor.publish()
    assert [job.payload(sequence).header.kind for sequence in (0, 1)] == ["gradient", "end"]


@pytest.mark.parametrize("role", ["donor", "donor of its own weights", "receiver"])
def test_that_a_job_ends_well_where_the_disk_refuses_its_end(
    tmp_path: Path,
    fresh_state: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    role: str,
) -> None:
    if role == "receiver":
        job: Any = ReceiverAlone(tmp_path / "runs").receiver
    else:
        exchange = "gradient" if role == "donor" else "distill"
        job = DonorAlone(tmp_path / "runs", exchange=exchange).donor
    with failing(monkeypatch, 10**9):
        job.close()
    assert f"the other jobs are not told that the {job.job} has ended: the disk has" in caplog.text
    unpublished = "the last weights of the donor are not published: the disk has"
    assert (unpublished in caplog.text) == ("own weights" in role)
    assert not [thread for thread in threading.enumerate() if "heartbeat" in thread.name]


class SleepingClock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep)
        monkeypatch.setattr(reading_module, "time", clock)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("number", "seconds", "outcome"),
    [
        (errno.ENOENT, 4.0, "read"),
        (errno.ENOENT, 10.0, "lacking"),
        (errno.EIO, 50.0, "read"),
        (errno.EIO, 70.0, "an error"),
    ],
)
def test_that_a_rank_rides_out_what_the_main_process_does_not_see(
    tmp_path: Path,
    fresh_state: None,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    seconds: float,
    outcome: str,
) -> None:
    """A rank on another host, whose disk fails: no payload is refused for that."""
    job = ReceiverAlone(tmp_path / "runs", exchange="gradient")
    receiver = job.receiver
    receiver._publish_weights()
    job.donate(job.constant(1.0))
    digest = receiver.transport.read_header("donor", 0).tensors_digest
    receiver.config.peer_wait = 60.0
    clock, opened = SleepingClock(monkeypatch), os.open
    mended = clock.now + seconds

    def fail(path: Any, *args: Any, **options: Any) -> int:
        if clock.now < mended and Path(path).parent.name == "records":
            raise OSError(number, os.strerror(number))
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "open", fail)
    if outcome == "an error":
        with pytest.raises(DiskError, match="the disk of some rank has failed for 60 s"):
            receiver._reading.read_everywhere("donor", 0, digest, None)
    else:
        record = receiver._reading.read_everywhere("donor", 0, digest, None)
        assert (record is not None) == (outcome == "read")
    receiver._stop()


def test_that_a_resume_waits_for_the_disk(
    tmp_path: Path, fresh_state: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ReceiverAlone(tmp_path / "runs", exchange="gradient")
    job.backward()
    job.donate(job.constant(1.0))
    job.receiver.inject()
    assert job.receiver.commit()
    job.accelerator.save_state(str(tmp_path / "checkpoint"))
    job.receiver.close()
    reset()
    resumed = ReceiverAlone(
        tmp_path / "runs", exchange="gradient", resume_from_checkpoint=tmp_path / "checkpoint"
    )
    trail = trail_path(resumed.receiver.run_dir, 2)
    opened, left = Path.open, [2]

    def call(path: Path, *args: Any, **options: Any) -> Any:
        if path == trail and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", call)
    resumed.accelerator.load_state(str(tmp_path / "checkpoint"))
    assert left == [0]
    assert len(trail.read_text().splitlines()) == 1
    assert resumed.receiver._collector.ledger.counts("donor")["applied"] == 1
    resumed.receiver.close()
