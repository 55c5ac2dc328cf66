"""Launched jobs whose processes are stopped, killed in part, started twice or from long ago."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator

import psutil
import pytest
from torch import Tensor

from tests.faults.running import (
    NUM_STEPS,
    FaultyRecipes,
    Role,
    await_end,
    await_output,
    check_undisturbed,
)
from tests.launching import Job
from tests.oracle import largest_difference
from tests.recipes.running import TIMEOUT, wait_until

pytestmark = pytest.mark.faults

GIVEN_UP_SECONDS = 15  # of silence; more than the jobs need to find each other
ROLES: tuple[Role, Role] = ("donor", "receiver")
OTHER: dict[Role, Role] = {"donor": "receiver", "receiver": "donor"}


@contextlib.contextmanager
def stopped(job: Job) -> Iterator[None]:
    """All processes of a job stand still, as under a scheduler that suspends it."""
    processes = job.processes()
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def rank_of(process: psutil.Process) -> int:
    """The rank of a process; -1 for a launcher."""
    return int(process.environ().get("RANK", -1))


def test_jobs_that_stand_still_for_less_than_peer_wait_change_nothing(
    recipes: FaultyRecipes, undisturbed: dict[str, Tensor]
) -> None:
    jobs = {role: recipes.start(role) for role in ROLES}
    for number, role in enumerate(ROLES, 1):
        recipes.await_payload(80 * number)
        with stopped(jobs[role]):
            await_output(jobs[OTHER[role]], f"the {role} is silent, for")
    for job in jobs.values():
        job.wait(TIMEOUT)
        assert "TRAINING ALONE" not in job.output()
    check_undisturbed(recipes, undisturbed)


def test_both_jobs_suspended_for_longer_than_peer_wait_go_on_together(
    recipes: FaultyRecipes, undisturbed: dict[str, Tensor]
) -> None:
    """As by a scheduler that suspends a whole allocation: nobody was silent, nobody looked."""
    jobs = [recipes.start(role, "--peer_wait", GIVEN_UP_SECONDS) for role in ROLES]
    recipes.await_payload(80)
    asleep = subprocess.Popen(["sleep", str(1.5 * GIVEN_UP_SECONDS)])
    with stopped(jobs[0]), stopped(jobs[1]):
        asleep.wait()  # there is nothing to see of a time in which nobody looks
    for job in jobs:
        job.wait(TIMEOUT)
        assert "TRAINING ALONE" not in job.output()
    check_undisturbed(recipes, undisturbed)


def test_a_receiver_that_stood_still_for_longer_than_peer_wait_finds_its_donor_again(
    recipes: FaultyRecipes,
) -> None:
    donor = recipes.start("donor", "--peer_wait", GIVEN_UP_SECONDS)
    receiver = recipes.start("receiver")
    recipes.await_payload(80)
    with stopped(receiver):
        await_output(donor, "TRAINING ALONE: the receiver fell silent")
    for job in (donor, receiver):
        job.wait(TIMEOUT)
    assert "TRAINING ALONE" not in receiver.output()
    results = recipes.results("0001", "receiver")
    assert results["steps_alone"] == results["steps_taught"] == 0, "the donor came back in time"
    assert recipes.check_ledger()["applied"] == NUM_STEPS
    donated = recipes.results("0001", "donor")
    assert donated["windows_alone"] > 0
    assert donated["published"] == NUM_STEPS + 1


@pytest.mark.parametrize(("role", "rank"), [("donor", 0), ("receiver", 1)])
def test_one_rank_that_is_killed_ends_its_job_and_not_the_other(
    recipes: FaultyRecipes, role: Role, rank: int
) -> None:
    patience = ["--peer_wait", GIVEN_UP_SECONDS]
    bound = {"donor": ["--max_train_steps", 2 * NUM_STEPS], "receiver": []}
    jobs = {
        each: recipes.start(each, *patience, *bound[each], num_processes=1 + (each == role))
        for each in ROLES
    }
    recipes.await_payload(50)
    ranks = {rank_of(process): process for process in jobs[role].processes()}
    assert set(ranks) == {-1, 0, 1}
    ranks[rank].kill()
    assert jobs[role].wait(TIMEOUT, check=False) not in (0, 128 + signal.SIGTERM)
    await_end(jobs[role])
    assert not recipes.path("0001", role, "results.json").exists()
    other = OTHER[role]
    jobs[other].wait(TIMEOUT)
    assert f"TRAINING ALONE: the {role} fell silent" in jobs[other].output()
    results = recipes.results("0001", other)
    if other == "receiver":
        assert 0 < results["steps_alone"] == NUM_STEPS - recipes.check_ledger()["applied"]
    else:
        assert results["windows_alone"] > 0


@pytest.mark.parametrize("num_processes", [1, 2])
def test_ranks_whose_launcher_was_killed_train_to_the_end(
    recipes: FaultyRecipes, undisturbed: dict[str, Tensor], num_processes: int
) -> None:
    donor = recipes.start("donor")
    receiver = recipes.start("receiver", num_processes=num_processes)
    recipes.await_payload(50)
    receiver.process.kill()
    assert receiver.wait(TIMEOUT, check=False) == -signal.SIGKILL
    assert receiver.processes(), "the ranks went with it"
    donor.wait(TIMEOUT)
    await_end(receiver)
    assert "TRAINING ALONE" not in donor.output() + receiver.output()
    assert recipes.check_ledger()["applied"] == NUM_STEPS
    if num_processes == 1:
        check_undisturbed(recipes, undisturbed)


def test_a_second_donor_with_the_name_of_a_living_one_is_refused(recipes: FaultyRecipes) -> None:
    run = ["--run", "pair"]
    donor, receiver = recipes.start("donor", *run), recipes.start("receiver", *run)
    recipes.await_payload(20, "pair")
    with stopped(receiver):  # so that both live for as long as the other one takes to start
        second = recipes.start("donor", *run)
        assert second.wait(TIMEOUT, check=False) == 1
    assert "error: run 'pair' has a living donor (process" in second.output()
    assert "--donor_name" in second.output()
    for job in (donor, receiver):
        job.wait(TIMEOUT)
    assert recipes.check_ledger("pair")["applied"] == NUM_STEPS


def test_both_jobs_from_an_older_checkpoint_than_the_newest(
    recipes: FaultyRecipes, undisturbed: dict[str, Tensor]
) -> None:
    saving = ["--checkpointing_steps", 40, "--checkpoints_total_limit", 3]
    jobs = [recipes.start(role, *saving) for role in ROLES]
    for role in ROLES:
        wait_until(recipes.path("0001", role, "step_120").exists, f"{role}'s third checkpoint")
    for job in jobs:
        job.kill()
    assert not recipes.path("0001", "receiver", "results.json").exists(), "killed too late"
    highest = max(json.loads(line)["sequence"] for line in trail(recipes, 1))
    assert highest >= 119
    jobs = [
        recipes.start(
            role, *saving, "--resume_from_checkpoint", recipes.path("0001", role, "step_80")
        )
        for role in ROLES
    ]
    for job in jobs:
        job.wait(TIMEOUT)
    assert largest_difference(recipes.weights("0001", "receiver"), undisturbed) == 0.0
    applied = [json.loads(line) for line in trail(recipes, 2)[1:]]
    assert [entry["receiver_step"] for entry in applied] == list(range(80, NUM_STEPS))
    assert {entry["fate"] for entry in applied} == {"applied"}
    assert [entry["sequence"] for entry in applied[: highest - 79]] == list(range(80, highest + 1))
    assert recipes.check_ledger()["applied"] == NUM_STEPS


def trail(recipes: FaultyRecipes, attempt: int) -> list[str]:
    """The lines of a start of the receiver."""
    name = f"ledger-{attempt:04d}.jsonl"
    return recipes.path("0001", "bridge", "receiver", name).read_text().splitlines()
