"""``gradient-bridge inspect`` on damaged runs and on runs that change; and that it only reads."""

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

from tests.unit.run_files import Inspect, SmallRun, Streams, flip, plain_files
from tests.unit.streams import Bridge
from toolkit.bridge.ledger import Ledger, trail_path
from toolkit.bridge.payload import parse_record, write_record
from toolkit.bridge.transport import DirectoryTransport
from toolkit.inspection import run as inspection_run
from toolkit.inspection.command import watch
from toolkit.inspection.fates import numbers_present
from toolkit.inspection.files import Listing
from toolkit.inspection.verify import Verification

# -- the bytes ------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def swap(path: Path) -> None:
    path.write_bytes(path.with_name("0000000005.safetensors").read_bytes())


def enlarge(path: Path) -> None:
    os.truncate(path, 2**34)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip, "digest"), (cut, "truncated"), (swap, "alien"), (enlarge, "too_large"),
        (pipe, "not_a_file"), (loop, "not_a_file"),
    ],
)  # fmt: skip
def test_that_a_bad_record_is_named_with_its_reason(
    tmp_path: Path, inspect: Inspect, damage: Callable[[Path], None], reason: str
) -> None:
    streams = Streams(tmp_path / "0001")
    streams.start("receiver", 2, record_bytes=2**20)
    for sequence in range(6):
        streams.publish(sequence)
    assert inspect(streams.run_dir, "--verify")[1]["verified"]["num_records"] == 6
    damage(streams.transport.path("donor", 4))
    assert inspect(streams.run_dir)[0] == 0

    status, run = inspect(streams.run_dir, "--verify")

    (bad,) = run["verified"]["bad"]
    assert bad["path"] == "bridge/donor/records/0000000004.safetensors"
    assert bad["reason"] == reason
    assert run["verified"]["num_records"] == 6
    assert (status, run["ok"]) == (1, False)
    assert bad["path"] in run["problems"][0]


def test_that_kept_records_are_verified_once_and_against_the_ledger(
    small: SmallRun, inspect: Inspect
) -> None:
    for sequence in (0, 1):  # deleted, and kept under its other name
        small.record(sequence).unlink()
    _, run = inspect(small.run_dir, "--verify")
    sizes = [p.stat().st_size for p in plain_files(small.bridge) if p.parent.name == "records"]
    kept = small.receiver.transport.kept_path("donor", 0)
    # The record of the payload that was refused lies elsewhere.
    assert run["verified"]["num_records"] == len(sizes) + 1
    assert run["verified"]["num_bytes"] == sum(sizes) + kept.stat().st_size
    assert run["verified"]["bad"] == []

    record = parse_record(kept.read_bytes())
    kept.unlink()
    write_record(kept, record.header, small.constant(9.0))
    status, run = inspect(small.run_dir, "--verify")

    assert [bad["path"] for bad in run["verified"]["bad"]] == [
        "bridge/donor/kept/0000000000.safetensors"
    ]
    assert "another payload was applied" in run["problems"][0]
    assert status == 1


# -- it only reads --------------------------------------------------------------------------------

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


# -- damage ---------------------------------------------------------------------------------------

DEEP = b"[" * 100_000


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def make(bridge: Path) -> None:
        (bridge / name).write_bytes(content)

    return make


def put_pipe(name: str) -> Callable[[Path], None]:
    def make(bridge: Path) -> None:
        (bridge / name).unlink(missing_ok=True)
        os.mkfifo(bridge / name)

    return make


def put_directory(name: str) -> Callable[[Path], None]:
    def make(bridge: Path) -> None:
        (bridge / name).unlink(missing_ok=True)
        (bridge / name).mkdir()

    return make


def no_records(bridge: Path) -> None:
    shutil.rmtree(bridge / "donor" / "records")
    (bridge / "donor" / "records").write_bytes(b"")


CLAIM, NOTE, LEDGER = "donor/attempts/0001.json", "donor/rejected/0000000002.json", "ledger-0001"
DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("terms are garbage", write("run.json", b"\xff{"), "bridge/run.json cannot be read"),
    ("terms are a list", write("run.json", b"[1]"), "bridge/run.json cannot be read"),
    ("terms are deep", write("run.json", DEEP), "bridge/run.json cannot be read"),
    ("terms are missing", lambda b: (b / "run.json").unlink(), "bridge/run.json cannot be read"),
    ("terms are a pipe", put_pipe("run.json"), "bridge/run.json is no plain file"),
    ("terms are a directory", put_directory("run.json"), "run.json is no plain file"),
    ("claim is garbage", write(CLAIM, b"{"), "the claim of the donor cannot be read"),
    ("claim is a pipe", put_pipe(CLAIM), f"bridge/{CLAIM} is no plain file"),
    ("claim is deep", write(CLAIM, DEEP), "the claim of the donor cannot be read"),
    ("heart is a pipe", put_pipe("donor/heartbeat"), "bridge/donor/heartbeat is no plain file"),
    ("mark is a pipe", put_pipe("donor/acknowledged"), "bridge/donor/acknowledged is no plain"),
    ("note is a pipe", put_pipe(NOTE), f"bridge/{NOTE} is no plain file"),
    ("ledger is garbage", write(f"receiver/{LEDGER}.jsonl", b"{}\n"), "the ledger cannot be read"),
    ("ledger is a pipe", put_pipe(f"receiver/{LEDGER}.jsonl"), f"{LEDGER}.jsonl is no plain file"),
    ("ledger is deep", write(f"receiver/{LEDGER}.jsonl", DEEP + b"\n"), "the ledger cannot be"),
    ("records are a file", no_records, "donor cannot be read"),
]  # fmt: skip


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all kinds of files, to be copied and damaged."""
    streams = Streams(tmp_path_factory.mktemp("pattern") / "0001")
    for sequence in range(4):
        streams.publish(sequence)
    streams.settle(1, 0, 1)
    streams.transport.acknowledge("donor", 2)
    streams.transport.reject("donor", 2, "digest", "")
    streams.transport.beat("donor", 1)
    return streams.run_dir


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("damage", "problem"), [pytest.param(*rest, id=name) for name, *rest in DAMAGES]
)
def test_that_damage_is_named_and_the_rest_is_shown(
    pattern: Path, tmp_path: Path, inspect: Inspect, damage: Callable[[Path], None], problem: str
) -> None:
    run_dir = tmp_path / "0001"
    shutil.copytree(pattern, run_dir)
    status, run = inspect(run_dir, "--verify")
    assert (status, run["problems"]) == (0, [])

    damage(run_dir / "bridge")
    status, run = inspect(run_dir, "--verify")

    assert status == 1
    assert [text for text in run["problems"] if problem in text]
    assert [stream["carries"] for stream in run["streams"] if stream["name"] == "receiver"] == [
        "weights"
    ]
    jobs = [(job["name"], job["state"]) for job in run["jobs"]]
    assert jobs == [("receiver", "silent"), ("donor", "silent")]


@pytest.mark.parametrize("names", [[], ["bridge"], ["bridge/donor/records"], ["bridge/donor"]])
def test_that_empty_directories_are_runs_that_nobody_has_joined(
    tmp_path: Path, inspect: Inspect, names: list[str]
) -> None:
    run_dir = tmp_path / "0001"
    for name in ["", *names]:
        (run_dir / name).mkdir(parents=True, exist_ok=True)

    status, run = inspect(tmp_path)

    assert (status, run["problems"]) == (0, [])
    assert run["name"] == "0001"
