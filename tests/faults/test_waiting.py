"""What a job costs the shared file system while its peer says nothing, as strace sees it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.faults.system_calls import metadata_operations
from tests.launching import Job, Launcher
from tests.recipes.running import DONOR, RECEIVER, ROOT, Recipes, wait_until
from toolkit.bridge.resting import QUIET_SECONDS

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed"),
]

PER_SECOND = 2.0  # operations on names below the run's directory
SECONDS = 64.0  # in which there is a whole look
FLAGS = ["--run", "mine", "--exchange", "gradient", "--peer_wait", 600]


@pytest.fixture
def recipes(launcher: Launcher, tmp_path: Path) -> Recipes:
    return Recipes(launcher, tmp_path)


def rank_0(job: Job, recipe: str) -> int:
    """The process that runs a recipe, and not its launcher."""
    commands = {process.pid: process.cmdline() for process in job.processes()}
    pids = [
        pid
        for pid, command in commands.items()
        if str(ROOT / recipe) in command and "accelerate.commands.launch" not in command
    ]
    assert len(pids) == 1, commands
    return pids[0]


def measure(job: Job, recipe: str, recipes: Recipes, seconds: float) -> float:
    """Operations a second."""
    log = recipes.cwd / "strace.txt"
    calls = metadata_operations(rank_0(job, recipe), recipes.path(), seconds, log)
    print(recipe, dict(calls), f"{sum(calls.values()) / seconds:.2f} a second")
    return sum(calls.values()) / seconds


def suspend(job: Job) -> Callable[[], None]:
    """Stop all processes of a job; what lets them go on."""
    stopped: list[psutil.Process] = job.processes()
    for process in stopped:
        process.suspend()
    return lambda: [process.resume() for process in stopped].clear()


def num_fates(recipes: Recipes) -> int:
    trails = recipes.path("mine", "bridge", "receiver").glob("ledger-*.jsonl")
    return sum(len(trail.read_text().splitlines()) for trail in trails)


@pytest.mark.parametrize("stopped", ["donor", "receiver"])
def test_that_a_job_whose_peer_is_frozen_rests_and_goes_on_when_it_thaws(
    recipes: Recipes, stopped: str
) -> None:
    jobs = {
        "receiver": recipes(RECEIVER, *FLAGS, "--max_train_steps", 100_000),
        "donor": recipes(DONOR, *FLAGS),
    }
    wait_until(lambda: num_fates(recipes) > 10, "the first steps")
    resume = suspend(jobs[stopped])
    waits, recipe = ("donor", DONOR) if stopped == "receiver" else ("receiver", RECEIVER)
    time.sleep(QUIET_SECONDS + 2)
    assert measure(jobs[waits], recipe, recipes, SECONDS) <= PER_SECOND
    before = num_fates(recipes)
    resume()
    wait_until(lambda: num_fates(recipes) > before + 10, "further steps")
    assert "TRAINING ALONE" not in jobs[waits].output()


@pytest.mark.parametrize(
    ("recipe", "exchange"),
    [(RECEIVER, "gradient"), (RECEIVER, "distill"), (RECEIVER, "head"), (DONOR, "gradient")],
)
def test_that_a_job_whose_peer_never_came_rests(
    recipes: Recipes, recipe: str, exchange: str
) -> None:
    flags = ["--init_h2", "donor"] if exchange == "head" else []
    job = recipes(recipe, *FLAGS, "--exchange", exchange, *flags)
    role = "receiver" if recipe == RECEIVER else "donor"
    wait_until(recipes.path("mine", "bridge", role, "heartbeat").exists, "its heart")
    time.sleep(QUIET_SECONDS + 4)
    assert measure(job, recipe, recipes, SECONDS) <= PER_SECOND
