"""Who lives, to ``gradient-bridge inspect``: whose heartbeat counter moves while it looks."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.run_files import Inspect, Streams, inspecting
from tests.unit.starts import Jobs
from toolkit.bridge import liveness
from toolkit.bridge.liveness import Heartbeat
from toolkit.bridge.transport import DirectoryTransport
from toolkit.inspection import run as inspection_run
from toolkit.inspection.command import watch


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(inspection_run, "BEAT_SECONDS", 0.1)


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Inspect:
    return inspecting(capsys, 0.5)


def states(run: dict[str, Any]) -> dict[str, str]:
    return {job["name"]: job["state"] for job in run["jobs"]}


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    jobs = Jobs(tmp_path / "runs")
    yield jobs
    jobs.kill_all()


def test_that_a_job_waits_until_the_other_one_has_come(jobs: Jobs, inspect: Inspect) -> None:
    run_dir = jobs.start("donor").run_dir
    assert states(inspect(run_dir)[1]) == {"donor": "waiting"}

    jobs.start("receiver")
    _, run = inspect(run_dir)

    assert states(run) == {"receiver": "alive", "donor": "alive"}
    assert [job["role"] for job in run["jobs"]] == ["receiver", "donor"]
    assert {job["pid"] for job in run["jobs"]} == {os.getpid()}
    assert [job["heads"] for job in run["jobs"]] == [["heads.h2"], ["heads.h2"]]


def test_that_a_job_ends_only_by_saying_so(jobs: Jobs, inspect: Inspect) -> None:
    donor, _ = jobs.start("donor"), jobs.start("receiver")
    jobs.publish(donor, "donor")
    jobs.kill_all()

    status, run = inspect(donor.run_dir)

    assert states(run) == {"receiver": "silent", "donor": "ended"}
    assert status == 0


def test_that_a_job_that_was_started_again_after_its_end_lives(
    jobs: Jobs, inspect: Inspect
) -> None:
    donor, _ = jobs.start("donor"), jobs.start("receiver")
    jobs.publish(donor, "donor")
    jobs.publish(donor, "receiver")

    assert states(inspect(donor.run_dir)[1]) == {"receiver": "alive", "donor": "alive"}


def test_that_a_job_that_ends_under_the_watch_has_ended(jobs: Jobs) -> None:
    donor = jobs.start("donor")
    (look,), _ = watch([donor.run_dir], 5)
    jobs.publish(donor, "donor")

    assert [job.state for job in look.report().jobs] == ["ended"]


def test_that_a_job_that_comes_under_the_watch_lives(jobs: Jobs) -> None:
    donor = jobs.start("donor")
    (look,), _ = watch([donor.run_dir], 5)
    jobs.start("receiver", beats=False)

    assert [job.state for job in look.report().jobs] == ["alive", "alive"]


def test_that_new_times_of_a_heartbeat_are_no_life(tmp_path: Path) -> None:
    streams = Streams(tmp_path / "0001")
    streams.transport.beat("donor", 5)
    heartbeat = tmp_path / "0001" / "bridge" / "donor" / "heartbeat"
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(0.001):
            streams.transport.beat("donor", 5)
            os.utime(heartbeat)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        (look,), watched = watch([streams.run_dir], 0.3)
    finally:
        stop.set()
        thread.join()

    assert [job.state for job in look.report().jobs] == ["silent", "silent"]
    assert watched >= 0.3


def test_that_all_runs_are_watched_at_the_same_time(tmp_path: Path) -> None:
    runs = [Streams(tmp_path / f"{n:04d}").run_dir for n in range(1, 6)]
    hearts = [Heartbeat(DirectoryTransport(run / "bridge"), "donor") for run in runs]
    hearts += [Heartbeat(DirectoryTransport(run / "bridge"), "receiver") for run in runs]
    try:
        looks, watched = watch(runs, 60)
    finally:
        for heart in hearts:
            heart.stop()

    assert {job.state for look in looks for job in look.report().jobs} == {"alive"}
    assert watched < 30  # as soon as all were seen


def test_that_a_silent_job_is_watched_though_those_of_another_run_were_seen(tmp_path: Path) -> None:
    lively, silent = (Streams(tmp_path / name).run_dir for name in ("0001", "0002"))
    jobs = ("donor", "receiver")
    hearts = [Heartbeat(DirectoryTransport(lively / "bridge"), job) for job in jobs]
    try:
        _, watched = watch([lively, silent], 0.5)
    finally:
        for heart in hearts:
            heart.stop()

    assert watched >= 0.5
