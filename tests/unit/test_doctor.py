"""What ``gradient-bridge doctor`` measures, on a real directory by two real processes."""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import toolkit
from toolkit import cli
from toolkit.bridge import files
from toolkit.bridge.polling import pause
from toolkit.doctor import command as doctor
from toolkit.doctor import measures as doctor_measures
from toolkit.doctor import peer as doctor_peer
from toolkit.doctor.measures import find_place, measure_costs, try_promises
from toolkit.doctor.peer import LAST, Peer
from toolkit.doctor.report import Times

QUICK = ["--seconds", "0.4", "--payload_mib", "1"]


def nobody(name: str) -> None:
    """Whoever wants to know what is measured now."""


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    directory = tmp_path / "runs"
    directory.mkdir()
    return directory


def refuse(number: int) -> Any:
    def call(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def test_that_a_usual_directory_is_measured_and_left_as_it_was(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shared / "0001").mkdir()

    assert cli.main(["doctor", str(shared), "--json", *QUICK]) == 0

    report = json.loads(capsys.readouterr().out)
    assert [path.name for path in shared.iterdir()] == ["0001"]
    assert set(report["promises"].values()) == {True}
    assert report["usable"] is True
    assert report["advice"]["obstacles"] == []
    costs = report["costs"]
    for name in ("fsync_file", "fsync_directory", "publish", "visibility"):
        assert 0 < costs[name]["p50"] <= costs[name]["p99"]
        assert costs[name]["num_tries"] >= 1
    assert costs["written_bytes"] == 2**20
    assert min(costs["write_bytes_per_second"], costs["read_bytes_per_second"]) > 2**20
    assert report["place"]["max_name_bytes"] == os.pathconf(shared, "PC_NAME_MAX")


def test_that_the_shape_of_the_json_stays(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor", str(shared), "--json", *QUICK])

    report = json.loads(capsys.readouterr().out)
    assert {name: set(part) for name, part in report.items() if isinstance(part, dict)} == {
        "place": {
            "file_system", "mount_point", "mount_options", "free_bytes", "free_inodes",
            "max_name_bytes", "mode", "others_may_write", "group_may_write",
        },
        "promises": {
            "hard_links", "link_never_replaces", "create_is_exclusive", "mkdir_is_exclusive",
            "rename_is_atomic", "pread_is_right", "mmap_is_right",
        },
        "costs": {
            "fsync_file", "fsync_directory", "publish", "visibility", "written_bytes",
            "write_bytes_per_second", "read_bytes_per_second", "clock_skew",
        },
        "advice": {"obstacles", "settings", "reasons", "notes"},
    }  # fmt: skip
    assert report["format"] == 1
    assert (report["payload_bytes"], report["step_seconds"]) == (2**20, 1.0)
    assert report["exchange_seconds"] > 0
    assert set(report["costs"]["publish"]) == {"p50", "p99", "num_tries"}


def test_that_it_is_told_in_a_table(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared.chmod(0o777)

    assert cli.main(["doctor", str(shared), *QUICK]) == 0

    out, _ = capsys.readouterr()
    assert "link yes, O_EXCL yes, mkdir yes" in out
    assert f"chmod go-w {shared}" in out
    assert "of a step of 1 s" in out
    assert "\x1b" not in out


# -- broken promises ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_that_without_hard_links_it_cannot_be_used(
    shared: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    monkeypatch.setattr(os, "link", refuse(number))

    assert cli.main(["doctor", str(shared), "--json", *QUICK]) == 1

    report = json.loads(capsys.readouterr().out)
    assert report["usable"] is False
    assert "hard link" in report["advice"]["obstacles"][0]
    assert len(report["advice"]["obstacles"]) == 1
    assert report["promises"]["hard_links"] is False
    assert report["promises"]["link_never_replaces"] is None
    assert (report["costs"]["publish"], report["costs"]["visibility"]) == (None, None)
    assert report["exchange_seconds"] is None
    assert not list(shared.iterdir())


def test_that_a_full_disk_is_not_taken_for_one_without_hard_links(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.ENOSPC))

    assert cli.main(["doctor", str(shared), *QUICK]) == 1
    assert "is full (No space left on device)" in capsys.readouterr().err


@pytest.mark.parametrize("wins", [True, False])
def test_that_a_name_with_two_makers_or_none_is_noticed(
    shared: Path, monkeypatch: pytest.MonkeyPatch, wins: bool
) -> None:
    def race(kind: str, root: Path, source: Path, seconds: float, num_names: int) -> list[bool]:
        if not wins:  # the names are taken, and nobody made them
            for number in range(num_names):
                (root / f"{kind}-{number}").mkdir(exist_ok=True)
        return [wins] * num_names

    with Peer(shared) as peer:
        if wins:  # the other process makes them too, where this one says that it did
            monkeypatch.setattr(doctor_measures, "race", race)
        else:
            for kind in ("link", "create", "mkdir"):
                race(kind, shared, shared, 0, doctor_measures.NUM_NAMES)
        promises = try_promises(shared, peer, 0.2)

    assert promises.link_never_replaces is False
    assert promises.create_is_exclusive is False
    assert promises.mkdir_is_exclusive is False
    assert promises.hard_links is True


def test_that_a_file_that_is_away_while_it_is_replaced_is_noticed(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(path: Path, content: bytes) -> None:
        path.unlink()
        if content != LAST:
            pause(0.1)
        path.write_bytes(content)

    monkeypatch.setattr(files, "replace", replace)
    with Peer(shared) as peer:
        assert not try_promises(shared, peer, 0.2).rename_is_atomic


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
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_peer, "GIVE_UP_SECONDS", 0.05)

    assert doctor_peer._see(shared / "record") is False
    (shared / "record").write_bytes(b"")
    assert doctor_peer._see(shared / "record") is True


class Blind(Peer):
    """A second process that does something else, and has not seen what it was to see."""

    def tell(self, task: str, *arguments: object) -> None:
        super().tell("watch", "last")

    def answer(self) -> object:
        answer = super().answer()
        return answer if answer == "ready" else False


def test_that_a_name_that_is_never_seen_has_no_latency(shared: Path) -> None:
    (shared / "source").write_bytes(b"")
    (shared / "last").write_bytes(LAST)
    with Blind(shared) as peer:
        costs = measure_costs(shared, peer, 0.2, 2**20, nobody)

    assert costs.visibility is None
    assert costs.publish is not None


def test_that_a_second_process_that_ends_is_an_error(shared: Path) -> None:
    with Peer(shared) as peer:
        peer.tell("no such task")
        with pytest.raises(OSError, match="a second process ended, status 1"):
            peer.answer()


def test_that_a_second_process_runs_this_package(shared: Path) -> None:
    with Peer(shared) as peer:
        directory = psutil.Process(peer._process.pid).cwd()

    assert Path(directory) == Path(toolkit.__file__).parent.parent


def test_that_a_second_process_is_ended_whatever_it_does(shared: Path) -> None:
    with Peer(shared) as peer:
        peer.tell("watch", "what never comes")

    assert peer._process.returncode == -signal.SIGKILL


# -- errors and the end ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "is full (No space left on device): delete old runs"),
        (errno.EDQUOT, "is full (Disk quota exceeded): delete old runs"),
        (errno.EROFS, "cannot write in {} (Read-only file system): give a directory"),
        (errno.EACCES, "cannot write in {} (Permission denied): give a directory"),
        (errno.EIO, "{} cannot be used: [Errno 5] Input/output error"),
    ],
)
def test_that_an_error_names_its_remedy_and_leaves_nothing(
    shared: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    remedy: str,
) -> None:
    monkeypatch.setattr(os, "fsync", refuse(number))

    assert cli.main(["doctor", str(shared), "--json", *QUICK]) == 1

    out, err = capsys.readouterr()
    assert remedy.format(shared) in err
    content = json.loads(out)
    assert content["error"] in err
    assert content["usable"] is False
    assert not list(shared.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere does not exist: give the directory"),
        ("file", "file is no directory: give the directory"),
    ],
)
def test_that_only_a_directory_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    (tmp_path / "file").write_bytes(b"")

    assert cli.main(["doctor", str(tmp_path / name)]) == 1
    assert message in capsys.readouterr().err


def test_that_a_directory_that_nobody_may_write_to_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not Path("/sys/kernel").is_dir():
        pytest.skip("no directory that even root may not write to")

    assert cli.main(["doctor", "/sys/kernel"]) == 1
    assert "cannot write in /sys/kernel" in capsys.readouterr().err


@pytest.mark.timeout(60)
def test_that_ctrl_c_leaves_nothing_behind(shared: Path) -> None:
    command = [sys.executable, "-m", "toolkit.cli", "doctor", str(shared)]
    command += ["--seconds", "600", "--payload_mib", "1500"]  # it does not end before the signal
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell that starts the tests in the background lets them ignore it.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while not list(shared.glob(".gradient-bridge-doctor-*/link-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)

    assert process.returncode == 130, err
    assert children
    assert not [child for child in children if child.is_running()]
    assert not list(shared.iterdir())


# -- figures --------------------------------------------------------------------------------------


def test_that_percentiles_are_by_the_nearest_rank() -> None:
    assert Times.of([3.0, 1.0, 2.0]) == Times(p50=2.0, p99=3.0, num_tries=3)
    assert Times.of([float(n) for n in range(200, 0, -1)]) == Times(
        p50=100.0, p99=198.0, num_tries=200
    )
    assert Times.of([0.5]) == Times(p50=0.5, p99=0.5, num_tries=1)


def test_that_the_file_systems_clock_is_compared_with_the_hosts(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def skew_of(offset: float) -> float:
        now = SimpleNamespace(
            time=lambda: time.time() + offset, monotonic=time.monotonic,
            perf_counter=time.perf_counter,
        )  # fmt: skip
        monkeypatch.setattr(doctor_measures, "time", now)
        return measure_costs(shared, None, 0.01, 4096, nobody).clock_skew

    assert skew_of(0.0) == pytest.approx(0, abs=1)
    assert skew_of(100.0) == pytest.approx(-100, abs=1)


def test_that_a_slow_disk_is_not_filled_for_long(
    shared: Path, monkeypatch: pytest.MonkeyPatch
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

    size, seconds, _ = doctor_measures._write_and_read(shared / "large", 16.0, 64 * 2**20)

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
def test_that_it_is_seen_who_may_write(shared: Path, mode: int, group: bool, others: bool) -> None:
    shared.chmod(mode)
    place = find_place(shared)

    assert (place.group_may_write, place.others_may_write) == (group, others)
    assert place.mode == f"{mode:o}"


def test_that_the_command_line_answers_without_torch() -> None:
    code = "import sys, toolkit.cli; toolkit.cli.build_parser(); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_that_the_second_process_needs_no_torch() -> None:
    code = "import sys, toolkit.doctor.peer; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_that_the_progress_display_counts_all_stages(shared: Path) -> None:
    stages: list[str] = []
    doctor.examine(shared, 0.1, 4096, 1.0, stages.append)
    assert len(stages) == doctor.NUM_STAGES
