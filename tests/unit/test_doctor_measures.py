"""What ``gradient-bridge doctor`` tries and measures, with a second process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import toolkit
from toolkit.bridge import files
from toolkit.bridge.polling import pause
from toolkit.doctor import measures as doctor_measures
from toolkit.doctor import peer as doctor_peer
from toolkit.doctor.measures import find_place, measure_costs, try_promises
from toolkit.doctor.peer import LAST, Peer
from toolkit.doctor.report import Times


def nobody(name: str) -> None:
    """Whoever wants to know what is measured now."""


@pytest.mark.parametrize("wins", [True, False])
def test_that_a_name_with_two_makers_or_none_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wins: bool
) -> None:
    def race(kind: str, root: Path, source: Path, seconds: float, num_names: int) -> list[bool]:
        if not wins:  # the names are taken, and nobody made them
            for number in range(num_names):
                (root / f"{kind}-{number}").mkdir(exist_ok=True)
        return [wins] * num_names

    with Peer(tmp_path) as peer:
        if wins:  # the other process makes them too, where this one says that it did
            monkeypatch.setattr(doctor_measures, "race", race)
        else:
            for kind in ("link", "create", "mkdir"):
                race(kind, tmp_path, tmp_path, 0, doctor_measures.NUM_NAMES)
        promises = try_promises(tmp_path, peer, 0.2)

    assert promises.link_never_replaces is False
    assert promises.create_is_exclusive is False
    assert promises.mkdir_is_exclusive is False
    assert promises.hard_links is True


def test_that_a_file_that_is_away_while_it_is_replaced_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(path: Path, content: bytes) -> None:
        path.unlink()
        if content != LAST:
            pause(0.1)
        path.write_bytes(content)

    monkeypatch.setattr(files, "replace", replace)
    with Peer(tmp_path) as peer:
        assert not try_promises(tmp_path, peer, 0.2).rename_is_atomic


def test_that_a_file_that_mixes_old_and_new_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "replaced"
    contents = iter([b"11", b"12", b"", b"3", LAST])

    class Changing:
        def read_bytes(self) -> bytes:
            return next(contents)

    assert doctor_peer._watch_replaced(Changing()) == (4, 2)  # type: ignore[arg-type]
    path.write_bytes(LAST)
    assert doctor_peer._watch_replaced(path) == (0, 0)


def test_that_a_reader_gives_up_on_a_name_that_does_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_peer, "GIVE_UP_SECONDS", 0.05)

    assert doctor_peer._see(tmp_path / "record") is False
    (tmp_path / "record").write_bytes(b"")
    assert doctor_peer._see(tmp_path / "record") is True


class Blind(Peer):
    """A second process that does something else, and has not seen what it was to see."""

    def tell(self, task: str, *arguments: object) -> None:
        super().tell("watch", "last")

    def answer(self) -> object:
        answer = super().answer()
        return answer if answer == "ready" else False


def test_that_a_name_that_is_never_seen_has_no_latency(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"")
    (tmp_path / "last").write_bytes(LAST)
    with Blind(tmp_path) as peer:
        costs = measure_costs(tmp_path, peer, 0.2, 2**20, nobody)

    assert costs.visibility is None
    assert costs.publish is not None


def test_that_a_second_process_that_ends_is_an_error(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer:
        peer.tell("no such task")
        with pytest.raises(OSError, match="a second process ended, status 1"):
            peer.answer()


def test_that_a_second_process_runs_this_package(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer:
        directory = psutil.Process(peer._process.pid).cwd()

    assert Path(directory) == Path(toolkit.__file__).parent.parent


def test_that_a_second_process_is_ended_whatever_it_does(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer:
        peer.tell("watch", "what never comes")

    assert peer._process.returncode == -signal.SIGKILL


# -- figures ---------------------------------------------------------------------------------------


def test_that_percentiles_are_by_the_nearest_rank() -> None:
    assert Times.of([3.0, 1.0, 2.0]) == Times(p50=2.0, p99=3.0, num_tries=3)
    assert Times.of([float(n) for n in range(200, 0, -1)]) == Times(
        p50=100.0, p99=198.0, num_tries=200
    )
    assert Times.of([0.5]) == Times(p50=0.5, p99=0.5, num_tries=1)


def test_that_the_file_systems_clock_is_compared_with_the_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def skew_of(offset: float) -> float:
        now = SimpleNamespace(
            time=lambda: time.time() + offset, monotonic=time.monotonic,
            perf_counter=time.perf_counter,
        )  # fmt: skip
        monkeypatch.setattr(doctor_measures, "time", now)
        return measure_costs(tmp_path, None, 0.01, 4096, nobody).clock_skew

    assert skew_of(0.0) == pytest.approx(0, abs=1)
    assert skew_of(100.0) == pytest.approx(-100, abs=1)


def test_that_a_slow_disk_is_not_filled_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = SimpleNamespace(seconds=0.0)
    synced = os.fsync

    def fsync(descriptor: int) -> None:
        synced(descriptor)
        now.seconds += os.fstat(descriptor).st_size / 2**20  # 1 MiB/s

    clock = SimpleNamespace(
        time=time.time, monotonic=lambda: now.seconds, perf_counter=lambda: now.seconds + 1e-9
    )
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(doctor_measures, "time", clock)

    size, seconds, _ = doctor_measures._write_and_read(tmp_path / "large", 16.0, 64 * 2**20)

    assert size == 8 * 2**20
    assert seconds == pytest.approx(8.0)


MOUNTS = """\
/dev/vda / ext4 rw,relatime 0 0
server:/home {home} nfs4 rw,vers=4.2 0 0
tmpfs {home}/with\\040blank tmpfs rw 0 0
/dev/vdb {home}/with\\040blank xfs rw,noatime 0 0
tmpfs {home}/with\\040 tmpfs rw 0 0
"""


def test_that_the_innermost_and_newest_mount_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mounts"
    monkeypatch.setattr(doctor_measures, "MOUNTS", mounts)
    (tmp_path / "home" / "with blank" / "runs").mkdir(parents=True)
    (tmp_path / "homes").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home" / "with blank")
    mounts.write_text(MOUNTS.format(home=tmp_path / "home"))

    def kind(name: str) -> tuple[str | None, list[str]]:
        place = find_place(tmp_path / name)
        return place.file_system, place.mount_options

    assert kind("home") == ("nfs4", ["rw", "vers=4.2"])
    assert kind("homes")[0] == "ext4"
    assert kind("home/with blank/runs") == ("xfs", ["rw", "noatime"])
    assert kind("link/runs")[0] == "xfs"
    mounts.unlink()
    assert kind("home") == (None, [])


@pytest.mark.parametrize(
    ("mode", "group", "others"),
    [(0o700, False, False), (0o775, True, False), (0o757, False, True), (0o1777, True, True)],
)
def test_that_it_is_seen_who_may_write(
    tmp_path: Path, mode: int, group: bool, others: bool
) -> None:
    tmp_path.chmod(mode)
    place = find_place(tmp_path)

    assert (place.group_may_write, place.others_may_write) == (group, others)
    assert place.mode == f"{mode:o}"


def test_that_the_second_process_needs_no_torch() -> None:
    code = "import sys, toolkit.doctor.peer; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
