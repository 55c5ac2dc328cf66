"""Records read ahead: each once, and whatever its reading raises where it is asked for."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator

import pytest

from toolkit.bridge.errors import PayloadError
from toolkit.bridge.payload import Header, Record
from toolkit.bridge.prefetch import Prefetch

PATIENCE_SECONDS = 30.0  # of this test, where something hangs


class Shelf:
    """Records that are there, and how often each was read."""

    def __init__(self) -> None:
        self.there: list[int] = []
        self.num_reads: dict[int, int] = {}
        self.errors: dict[int, list[Exception]] = {}
        self.was_read = threading.Condition()

    def find(self) -> list[tuple[str, int]]:
        return [("donor", number) for number in self.there[-1:]]

    def read(self, job: str, sequence: int) -> Record:
        with self.was_read:
            self.num_reads[sequence] = self.num_reads.get(sequence, 0) + 1
            self.was_read.notify_all()
        if self.errors.get(sequence):
            raise self.errors[sequence].pop(0)
        header = Header(
            kind="gradient", run_id="r", job=job, sequence=sequence, attempt=1, receiver_step=0,
            weights_digest="",
        )  # fmt: skip
        return Record(header=header, tensors={}, num_bytes=0)

    def await_reads(self, sequence: int, number: int = 1) -> None:
        with self.was_read:
            assert self.was_read.wait_for(
                lambda: self.num_reads.get(sequence, 0) >= number, PATIENCE_SECONDS
            )


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def prefetch(shelf: Shelf) -> Iterator[Prefetch]:
    made = Prefetch(shelf.find, shelf.read)
    made.read("donor", 0)  # it begins with the first
    shelf.num_reads.clear()
    yield made
    made.stop()


def test_that_a_record_is_read_ahead_and_once(shelf: Shelf, prefetch: Prefetch) -> None:
    for number in (3, 4):
        shelf.there.append(number)
        shelf.await_reads(number)
        assert prefetch.read("donor", number).header.sequence == number
    assert shelf.num_reads == {3: 1, 4: 1}


def test_that_what_was_not_read_ahead_is_read(shelf: Shelf, prefetch: Prefetch) -> None:
    assert prefetch.read("donor", 7).header.sequence == 7
    shelf.there.append(8)
    shelf.await_reads(8)
    assert prefetch.read("other", 8).header.job == "other"
    assert prefetch.read("donor", 6).header.sequence == 6


def test_that_a_refusal_is_raised_where_it_is_asked_for(shelf: Shelf, prefetch: Prefetch) -> None:
    shelf.errors[2] = [PayloadError("digest", "for this test")]
    shelf.there.append(2)
    shelf.await_reads(2)
    with pytest.raises(PayloadError, match="for this test"):
        prefetch.read("donor", 2)
    assert shelf.num_reads == {2: 1}


def test_that_a_failing_disk_is_tried_again(shelf: Shelf, prefetch: Prefetch) -> None:
    shelf.errors[5] = [OSError(errno.EIO, "Input/output error")] * 3
    shelf.there.append(5)
    shelf.await_reads(5, 4)
    assert prefetch.read("donor", 5).header.sequence == 5
    shelf.errors[6] = [OSError(errno.EIO, "Input/output error")]
    with pytest.raises(OSError, match="Input/output"):
        prefetch.read("donor", 6)


def test_that_nothing_is_read_once_it_has_stopped(shelf: Shelf, prefetch: Prefetch) -> None:
    """A process that ends while a thread is inside of torch is aborted."""
    thread = prefetch._thread
    assert thread is not None
    assert thread.is_alive()
    prefetch.stop()
    assert not thread.is_alive()
