"""A disk that fails for a while: what is tried again is there once, and the trying ends."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.oracle import Case, build_dataset
from tests.unit.full_disk import no_file_above
from tests.unit.jobs import DonorAlone, ReceiverAlone, reset
from toolkit.bridge import job as job_module
from toolkit.bridge import outage
from toolkit.bridge.errors import BridgeError, DiskError
from toolkit.bridge.ledger import Entry, Ledger, trail_path
from toolkit.bridge.outage import STATUS_SECONDS, riding_out
from toolkit.bridge.payload import Header
from toolkit.bridge.publisher import Publisher
from toolkit.bridge.transport import DirectoryTransport

HEADER = Header(
    kind="gradient", run_id="run", job="donor", attempt=1, receiver_step=7, weights_digest="abc",
    count=5.0, loss=0.1,
)  # fmt: skip
TENSORS = {"w": torch.ones(3)}


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(outage, "time", SimpleNamespace(monotonic=lambda: self.now))


class Disk:
    """What a poll meets: an error, or what it finds."""

    def __init__(self) -> None:
        self.error: OSError | None = None
        self.found: int | None = None

    def poll(self) -> int | None:
        if self.error is not None:
            raise self.error
        return self.found


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "for writing again"),
        (errno.EIO, "gradient-bridge doctor"),
        (None, "gradient-bridge doctor"),
    ],
)
def test_that_a_disk_that_fails_for_too_long_is_an_error_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int | None,
    remedy: str,
) -> None:
    clock, disk = Clock(monkeypatch), Disk()
    poll = riding_out(disk.poll, Path("/runs/0001"), 60.0)
    disk.error = OSError() if number is None else OSError(number, os.strerror(number))
    for _ in range(6000):
        assert poll() is None
        clock.now += 0.01
    clock.now = 1060.0
    with pytest.raises(DiskError, match=f"for 60 s .*without /runs/0001: .*{remedy}"):
        poll()
    assert issubclass(DiskError, BridgeError)
    status = [record for record in caplog.records if "DISK FAILS" in record.message]
    assert len(status) == 60 / STATUS_SECONDS
    assert all(remedy in record.message for record in status)


def test_that_only_a_break_ends_the_count(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, disk = Clock(monkeypatch), Disk()
    poll = riding_out(disk.poll, Path("runs"), 60.0)
    for _ in range(10):
        disk.error = OSError(errno.EIO, "broken")
        assert poll() is None
        clock.now += 59.0
        assert poll() is None
        disk.error = None
        assert poll() is None, "nothing there yet, but the disk works"
    disk.found = 5
    assert poll() == 5
    assert caplog.messages.count("the disk works again after 59.0 s") == 10


def test_that_other_errors_end_a_job_at_once() -> None:
    def poll() -> None:
        raise BridgeError("another process publishes")

    with pytest.raises(BridgeError, match="another process"):
        riding_out(poll, Path("runs"), 60.0)()


# -- what is tried again --------------------------------------------------------------------------


def break_once(monkeypatch: pytest.MonkeyPatch, name: str, is_hit: Callable[..., bool]) -> None:
    """The next such call of ``os`` fails, after it was made if ``is_hit`` says so by its result."""
    original = getattr(os, name)
    done: list[None] = []

    def call(*args: Any, **options: Any) -> Any:
        if not done and is_hit(*args):
            done.append(None)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(*args, **options)

    monkeypatch.setattr(os, name, call)


def is_directory(descriptor: int) -> bool:
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


FAULTS: dict[str, tuple[str, Callable[..., bool]]] = {
    "chmod": ("chmod", lambda *args: True),
    "open": ("open", lambda *args: True),
    "fsync file": ("fsync", lambda descriptor: not is_directory(descriptor)),
    "link": ("link", lambda *args: True),
    "unlink": ("unlink", lambda *args: True),
    "fsync directory": ("fsync", is_directory),
}


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(DirectoryTransport(tmp_path), "donor", "run", 10_000)


def publish_again(publisher: Publisher, header: Header = HEADER) -> int:
    """As a job does: until it succeeds; how often it failed."""
    for num_failures in range(3):
        with contextlib.suppress(OSError):
            publisher.publish(header, TENSORS)
            return num_failures
    raise AssertionError("it never succeeded")


@pytest.mark.parametrize("fault", FAULTS)
def test_that_a_record_whose_publishing_failed_is_there_once(
    publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    publisher.publish(HEADER, TENSORS)
    synced: list[bool] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(is_directory(descriptor))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", note)
        break_once(patch, *FAULTS[fault])
        assert publish_again(publisher) == 1
    assert synced[-1], "what was there already is durable when publishing succeeds"
    publisher.publish(HEADER, TENSORS)

    names = [name for name in os.listdir(tmp_path / "donor" / "records") if name[0] != "."]
    assert sorted(names) == [f"{number:010d}.safetensors" for number in range(3)]
    assert (publisher.num_records, publisher.next_sequence) == (3, 3)
    sizes = [(tmp_path / "donor" / "records" / name).stat().st_size for name in names]
    assert publisher.num_bytes == sum(sizes)


@pytest.mark.parametrize("name", ["unlink", "listdir"])
def test_that_weights_are_published_once_where_older_ones_cannot_be_deleted(
    publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    records = tmp_path / "donor" / "records"
    for _ in range(3):
        publisher.publish(HEADER, TENSORS)
    with monkeypatch.context() as patch:
        break_once(
            patch, name, lambda path: Path(path).name in ("records", f"{0:010d}.safetensors")
        )
        publisher.publish_weights(HEADER, TENSORS)
    assert len(os.listdir(records)) == (3 if name == "unlink" else 4)
    publisher.publish_weights(HEADER, TENSORS)
    assert sorted(os.listdir(records)) == [f"{n:010d}.safetensors" for n in (3, 4)]


def test_that_another_jobs_record_is_no_leftover_of_a_failed_try(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        break_once(patch, *FAULTS["link"])
        with pytest.raises(OSError, match="Input/output"):
            publisher.publish(HEADER, TENSORS)
    rival = Publisher(DirectoryTransport(tmp_path), "donor", "run", 10_000)
    rival.publish(HEADER, {"w": torch.zeros(3)})

    with pytest.raises(BridgeError, match="another process publishes as the donor"):
        publisher.publish(HEADER, TENSORS)


def test_that_a_failed_record_that_is_there_is_no_rival_of_the_next_one(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job whose weights the disk refused at the very end gives up, and publishes its end."""
    with monkeypatch.context() as patch:
        break_once(patch, *FAULTS["fsync directory"])
        with pytest.raises(OSError, match="Input/output"):
            publisher.publish(HEADER, TENSORS)
    publisher.publish(dataclasses.replace(HEADER, kind="end"), {})

    transport = publisher._transport
    kinds = [transport.read_header("donor", number).kind for number in (0, 1)]
    assert kinds == ["gradient", "end"]
    assert (publisher.num_records, publisher.next_sequence) == (2, 2)


def test_that_a_record_that_fits_no_disk_is_an_os_error_and_leaves_nothing(
    publisher: Publisher, tmp_path: Path
) -> None:
    large = {"w": torch.ones(100_000)}
    with no_file_above(50_000), pytest.raises(OSError, match="File too large") as caught:
        publisher.publish(HEADER, large)

    assert caught.value.errno == errno.EFBIG
    assert os.listdir(tmp_path / "donor" / "records") == []
    publisher.publish(HEADER, large)
    assert publisher.next_sequence == 1


@pytest.mark.parametrize("durable", [False, True])
def test_that_a_trail_has_whole_lines_once(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "trail"
    ledger = Ledger(path, durable=durable)
    entries = [Entry("donor", number, "applied", number) for number in range(4)]
    ledger.record(entries[:1])
    ledger.note(entries[1:3])
    for _ in range(2):
        with no_file_above(path.stat().st_size + 20), pytest.raises(OSError, match="too large"):
            ledger.flush()
    ledger.note(entries[3:])
    ledger.flush()
    ledger.flush()

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["sequence"] for line in lines] == [0, 1, 2, 3]
    assert ledger.counts("donor")["applied"] == 4


@pytest.mark.parametrize("failing_sync", range(2))
def test_that_what_is_kept_is_durable_when_a_repeated_try_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_sync: int
) -> None:
    transport = DirectoryTransport(tmp_path)
    transport.open_stream("donor")
    transport.publish("donor", 0, lambda path: path.write_bytes(b"payload"))
    synced: list[str | None] = []

    def sync(descriptor: int) -> None:
        synced.append(None if len(synced) == failing_sync else directory(descriptor))
        if synced[-1] is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def directory(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match="Input/output"):
        transport.keep("donor", 0)
    transport.keep("donor", 0)
    assert {*synced} == {None, "donor", "kept"}
    assert transport.kept_path("donor", 0).read_bytes() == b"payload"


def test_that_a_trail_whose_first_line_failed_is_as_durable_and_as_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    ledger = Ledger(tmp_path / "trail", durable=True)
    ledger.note([Entry("donor", 0, "applied", 0)])
    with no_file_above(0), pytest.raises(OSError, match="too large"):
        ledger.flush()
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(is_directory(descriptor)))
    ledger.flush()

    assert synced == [False, True]
    assert (tmp_path / "trail").stat().st_mode & 0o777 == 0o600


# -- jobs -----------------------------------------------------------------------------------------


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
        monkeypatch.setattr(job_module, "time", clock)

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
            receiver._read_everywhere("donor", 0, digest, None)
    else:
        record = receiver._read_everywhere("donor", 0, digest, None)
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
    assert resumed.receiver.ledger.counts("donor")["applied"] == 1
    resumed.receiver.close()
