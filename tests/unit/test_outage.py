"""A disk that fails for a while: what is tried again is there once, and the trying ends."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.full_disk import is_directory, no_file_above
from toolkit.bridge import outage
from toolkit.bridge.errors import BridgeError, DiskError
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


def publish_again(publisher: Publisher) -> int:
    """As a job does: until it succeeds; how often it failed."""
    for num_failures in range(3):
        with contextlib.suppress(OSError):
            publisher.publish(HEADER, TENSORS)
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
