"""``gradient-bridge doctor`` on a real directory: what it says, its errors and its end."""

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
from typing import Any

import psutil
import pytest

from toolkit import cli
from toolkit.doctor import command as doctor

QUICK = ["--seconds", "0.4", "--payload_mib", "1"]


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


def test_that_the_command_line_answers_without_torch() -> None:
    code = "import sys, toolkit.cli; toolkit.cli.build_parser(); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_that_the_progress_display_counts_all_stages(shared: Path) -> None:
    stages: list[str] = []
    doctor.examine(shared, 0.1, 4096, 1.0, stages.append)
    assert len(stages) == doctor.NUM_STAGES
