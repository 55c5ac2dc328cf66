"""``gradient-bridge inspect`` on runs that change while it looks; and that it only reads."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.run_files import Inspect, SmallRun, Streams, cut, flip
from tests.unit.streams import Bridge
from toolkit.bridge.ledger import Ledger, trail_path
from toolkit.bridge.transport import DirectoryTransport
from toolkit.inspection import run as inspection_run
from toolkit.inspection.command import watch
from toolkit.inspection.fates import numbers_present
from toolkit.inspection.files import Listing
from toolkit.inspection.verify import Verification

_watched: list[str] = []  # the root that is watched, if any; hooks cannot be taken away

_written: list[str] = []

_CHANGING = {"mkdir", "rmdir", "remove", "rename", "link", "symlink", "truncate", "chmod", "utime"}


def _note_write(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    changes = event.removeprefix("os.") in _CHANGING
    if event == "open":
        flags = arguments[2] or 0
        changes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
    if changes and str(arguments[0]).startswith(_watched[0]):
        _written.append(f"{event} {arguments[0]}")


@contextlib.contextmanager
def noting_writes(root: Path) -> Iterator[list[str]]:
    _written.clear()
    _watched.append(str(root))
    try:
        yield _written
    finally:
        _watched.clear()


def tree(root: Path) -> dict[str, tuple[int, int, str]]:
    """All that is below ``root``: kind and permissions, time of change, content."""
    found = {}
    for path in root.rglob("*"):
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = status.st_mode, status.st_ctime_ns, content
    return found


def test_that_nothing_is_written(small: SmallRun, inspect: Inspect, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small.run_dir, copy)
    bridge = copy / "bridge"
    flip(bridge / "donor" / "records" / "0000000006.safetensors")
    cut(sorted((bridge / "receiver" / "records").iterdir())[0])
    (bridge / "donor" / "records" / ".tmp-crashed").write_bytes(b"")
    before = tree(copy)
    sys.addaudithook(_note_write)

    with noting_writes(copy) as written:
        _, run = inspect(copy, "--verify")
        assert written == []
        (copy / "control").write_bytes(b"")
        assert len(written) == 1
    (copy / "control").unlink()

    assert len(run["verified"]["bad"]) == 2
    assert tree(copy) == before


@pytest.mark.timeout(60)
def test_that_the_books_add_up_while_jobs_publish_settle_and_delete(tmp_path: Path) -> None:
    streams = Streams(tmp_path / "0001")
    bridge = Bridge(streams.transport)
    bridge.ledger = Ledger(trail_path(streams.run_dir, 1))
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            bridge.donate(at=bridge.step - bridge.step % 5 % 2)  # some are stale
            if bridge.step % 7 == 0:
                bridge.damage(bridge.published - 1)
            if bridge.look() is not None:
                bridge.take()
                streams.transport.acknowledge("donor", bridge.inbox.cursor)
                streams.transport.prune("donor", bridge.inbox.cursor)

    thread = threading.Thread(target=work)
    thread.start()
    published: list[int] = []
    try:
        while len(published) < 20 or published[-1] < published[0] + 20:
            (look,), _ = watch([streams.run_dir], 0.001)
            run = Verification(look, look.report()).read(lambda: None)
            assert run.fates[0].adds_up, run.fates
            assert not [p for p in run.problems if "records/" not in p], run.problems
            published.append(run.fates[0].published)
    finally:
        stop.set()
        thread.join()

    assert published == sorted(published)


class Moves:
    """Lets jobs go on between two readings: after the first call of any function given to it."""

    def __init__(self, move: Callable[[], None]) -> None:
        self._move: Callable[[], None] | None = move

    def after(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            found = function(*args)
            if self._move is not None:
                move, self._move = self._move, None
                move()
            return found

        return call


def test_that_a_payload_settled_and_deleted_between_two_readings_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(tmp_path / "0001")
    for sequence in range(3):
        streams.publish(sequence)

    def settle() -> None:
        streams.settle(1, 0, 1)
        streams.transport.acknowledge("donor", 2)
        streams.transport.prune("donor", 2)

    moves = Moves(settle)
    (look,), _ = watch([streams.run_dir], 0.01)
    for name in ("numbers_present", "read_path"):
        function = getattr(inspection_run, name)
        monkeypatch.setattr(inspection_run, name, moves.after(function))
    (fates,) = look.report().fates

    assert (fates.published, fates.applied, fates.pending) == (3, 2, 1)
    assert fates.adds_up


def test_that_a_record_put_aside_between_two_readings_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(tmp_path / "0001")
    streams.publish(0)
    moves = Moves(lambda: streams.transport.reject("donor", 0, "digest", ""))
    for name in ("sequences", "rejected"):
        function = getattr(DirectoryTransport, name)
        monkeypatch.setattr(DirectoryTransport, name, moves.after(function))

    assert numbers_present(streams.transport, "donor") == ({0}, 0)


def test_that_what_was_listed_may_be_gone_when_it_is_read(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small.run_dir, copy)
    listed = DirectoryTransport.sequences

    def list_and_lose(transport: DirectoryTransport, job: str) -> list[int]:
        found = listed(transport, job)
        for directory in ("records", "rejected"):
            shutil.rmtree(transport.root / job / directory, ignore_errors=True)
        return found

    (look,), _ = watch([copy], 0.01)
    monkeypatch.setattr(DirectoryTransport, "sequences", list_and_lose)
    run = Verification(look, look.report()).read(lambda: None)

    assert run.problems == []
    assert run.verified is not None
    assert run.verified.bad == []


def test_that_a_record_may_be_deleted_before_it_is_verified(tmp_path: Path) -> None:
    streams = Streams(tmp_path / "0001")
    for sequence in range(3):
        streams.publish(sequence)
    (look,), _ = watch([streams.run_dir], 0.01)
    verification = Verification(look, look.report())
    streams.transport.path("donor", 1).unlink()
    verified = verification.read(lambda: None).verified

    assert verified is not None
    assert (verified.num_records, verified.bad) == (2, [])


def test_that_a_file_may_go_while_its_directory_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").write_bytes(b"")
    (tmp_path / "stays").write_bytes(b"")
    listed = os.scandir

    @contextlib.contextmanager
    def list_and_lose(path: Path) -> Iterator[list[os.DirEntry[str]]]:
        with listed(path) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        (tmp_path / "gone").unlink()
        yield found

    monkeypatch.setattr(os, "scandir", list_and_lose)
    assert list(Listing(tmp_path).statuses) == [str(tmp_path / "stays")]
