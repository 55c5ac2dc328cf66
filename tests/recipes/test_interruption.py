"""Ctrl-C and a scheduler's SIGTERM on launched jobs: a checkpoint, a farewell, and going on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.launching import Job
from tests.oracle import largest_difference
from tests.recipes.running import DONOR, JOINT, RECEIVER, ROOT, TIMEOUT, Recipes, wait_until

STEPS = ("--max_train_steps", 200)
LOCKSTEP = ("--exchange", "gradient")


def ranks(job: Job) -> list[psutil.Process]:
    """The job's processes but for the launcher."""
    return [process for process in job.processes() if process.pid != job.process.pid]


def has_pending(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether a process that stands still has got a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    pending = status.partition("\nShdPnd:")[2].split()[0]
    return bool(int(pending, 16) >> (number - 1) & 1)


def records(recipes: Recipes) -> int:
    names = sorted(os.listdir(recipes.path("0001", "bridge", "donor", "records")))
    return int(names[-1].split(".")[0]) if names and names[-1][0] == "0" else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "to_launcher"),
    [(1, False), (2, True)],
    ids=["every process", "two ranks, by their launcher"],
)
def test_both_jobs_end_and_go_on_as_if_nothing_had_been(
    recipes: Recipes, num_processes: int, to_launcher: bool
) -> None:
    def start(*flags: object) -> tuple[Job, Job]:
        receiver = recipes(RECEIVER, *LOCKSTEP, *STEPS, *flags, num_processes=num_processes)
        return receiver, recipes(DONOR, *LOCKSTEP, *flags, num_processes=num_processes)

    jobs = start()
    wait_until(recipes.path("0001", "bridge", "donor", "records").exists, "the donor")
    wait_until(lambda: records(recipes) >= 30, "30 payloads")
    # All ranks get it at once: launchers of a busy machine may pass it on more than a step apart.
    every_rank = [rank for job in jobs for rank in ranks(job)]
    assert len(every_rank) == 2 * num_processes
    for rank in every_rank:
        rank.suspend()
    for job in jobs:
        for process in [psutil.Process(job.process.pid)] if to_launcher else job.processes():
            process.send_signal(signal.SIGTERM)
    wait_until(lambda: all(has_pending(rank, signal.SIGTERM) for rank in every_rank), "SIGTERM")
    for rank in every_rank:
        rank.resume()
    for job in jobs:
        wait_until(lambda job=job: not job.processes(), "its end")  # type: ignore[misc]
        assert job.wait(TIMEOUT, check=False) != 0
        assert "SIGTERM: ending after this step" in job.output()
        assert "SIGTERM: go on with --resume_from_checkpoint" in job.output()
        assert "Traceback" not in job.output() or num_processes > 1, "torchrun prints its own"
        assert "TRAINING ALONE" not in job.output()
    assert not recipes.path("0001", "receiver", "results.json").exists(), "stopped too late"

    for job in start("--resume_from_checkpoint", "latest"):
        job.wait(TIMEOUT)
    fates = recipes.results("0001", "receiver")["fates"]
    assert fates["applied"] == 200
    of_both = ["--receiver_processes", num_processes, "--donor_processes", num_processes]
    joint = recipes(JOINT, *STEPS, *of_both, "--output_dir", recipes.path("joint"))
    joint.wait(TIMEOUT)
    difference = largest_difference(recipes.weights("0001", "receiver"), recipes.weights("joint"))
    assert difference <= 1e-11


@pytest.mark.slow
def test_a_receiver_that_requires_its_donor_takes_no_step_alone_when_that_ends_first(
    recipes: Recipes,
) -> None:
    checkpoints = ("--checkpointing_steps", 20)

    def start(*flags: object) -> tuple[Job, Job]:
        own = (*LOCKSTEP, *checkpoints, *flags)
        return recipes(RECEIVER, *own, *STEPS, "--require_peer"), recipes(DONOR, *own)

    receiver, donor = start()
    wait_until(recipes.path("0001", "bridge", "donor", "records").exists, "the donor")
    wait_until(lambda: records(recipes) >= 50, "50 payloads")
    for process in donor.processes():
        process.send_signal(signal.SIGTERM)
    assert receiver.wait(TIMEOUT, check=False) != 0
    assert "has ended or fell silent, and --require_peer is set" in receiver.output()
    donor.wait(TIMEOUT, check=False)

    for job in start("--resume_from_checkpoint", "latest"):
        job.wait(TIMEOUT)
    assert recipes.results("0001", "receiver")["fates"]["applied"] == 200
    recipes(JOINT, *STEPS, "--output_dir", recipes.path("joint")).wait(TIMEOUT)
    difference = largest_difference(recipes.weights("0001", "receiver"), recipes.weights("joint"))
    assert difference <= 1e-11


@pytest.mark.parametrize("recipe", [DONOR, pytest.param(RECEIVER, marks=pytest.mark.slow)])
def test_ctrl_c_while_waiting_ends_soon_with_the_conventional_status(
    tmp_path: Path, recipe: str
) -> None:
    log = tmp_path / "log"
    with log.open("wb") as stream:
        job = subprocess.Popen(
            [sys.executable, str(ROOT / recipe)],
            cwd=tmp_path,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(lambda: "waiting for the" in log.read_text(), "the wait")
        job.send_signal(signal.SIGINT)
        assert job.wait(TIMEOUT) == 130
    finally:
        job.kill()
        job.wait()
    assert "Traceback" not in log.read_text()
    assert "TRAINING ALONE" not in log.read_text()


@pytest.mark.slow
def test_that_the_demo_leaves_no_job_behind_when_it_is_terminated(tmp_path: Path) -> None:
    demo = subprocess.Popen([sys.executable, "-m", "toolkit.cli", "demo"], cwd=tmp_path)
    process = psutil.Process(demo.pid)
    try:
        wait_until(lambda: len(process.children(recursive=True)) == 4, "two launched jobs")
        jobs = process.children(recursive=True)
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(TIMEOUT) == 143
    finally:
        demo.kill()
        demo.wait()
    assert not any(job.is_running() for job in jobs)
