"""Launched jobs on a disk that fails: for a while, which changes nothing, or for good."""

from __future__ import annotations

import re

import pytest
from torch import Tensor

from tests.faults.namespaces import fill, freeze, loop_disk, remount, small_disk
from tests.faults.running import NUM_STEPS, FaultyRecipes, Role, await_output, check_undisturbed
from tests.recipes.running import TIMEOUT, wait_until

pytestmark = pytest.mark.faults

STAYS_FULL_SECONDS = 15  # more than the jobs need to find each other
FROZEN_SECONDS = 7
OUTAGE_SECONDS = 20
RANK_SECONDS = 30


def test_a_disk_that_is_full_for_a_while_changes_nothing(
    recipes: FaultyRecipes, undisturbed: dict[str, Tensor]
) -> None:
    with small_disk(recipes.path(), mib=8):
        jobs = [recipes.start("donor"), recipes.start("receiver")]
        recipes.await_payload(50)
        ballast = fill(recipes.path())
        wait_until(lambda: any("DISK FAILS" in job.output() for job in jobs), "a full disk")
        ballast.unlink()
        for job in jobs:
            job.wait(TIMEOUT)
        output = "".join(job.output() for job in jobs)
        assert "No space left on device" in output
        assert "free some space" in output
        assert "the disk works again" in output
        assert "TRAINING ALONE" not in output
        check_undisturbed(recipes, undisturbed)


def test_a_disk_that_stays_full_ends_both_jobs_with_the_remedy(recipes: FaultyRecipes) -> None:
    with small_disk(recipes.path(), mib=8):
        patience = ["--peer_wait", STAYS_FULL_SECONDS, "--report_to", "none"]
        receiver = recipes.start("receiver", *patience)
        donor = recipes.start("donor", *patience, "--require_peer")
        recipes.await_payload(50)
        fill(recipes.path())
        assert receiver.wait(TIMEOUT, check=False) == 1
        assert donor.wait(TIMEOUT, check=False) == 1
        output = receiver.output()
        assert f"error: the disk has failed for {STAYS_FULL_SECONDS} s (--peer_wait)" in output
        assert "No space left on device" in output
        assert f"cannot go on without {recipes.path('0001')}: free some space" in output


@pytest.mark.parametrize("error", ["EDQUOT", "EIO", "EROFS", "ESTALE", "EACCES"])
def test_errors_of_either_side_that_pass_change_nothing(
    recipes: FaultyRecipes, undisturbed: dict[str, Tensor], error: str
) -> None:
    jobs = {role: recipes.start(role) for role in roles()}
    for number, role in enumerate(roles(), 1):
        recipes.await_payload(80 * number)
        recipes.disturb(role, f"error {error}")
        await_output(jobs[role], "DISK FAILS")
        recipes.mend(role)
    for job in jobs.values():
        job.wait(TIMEOUT)
    for role, job in jobs.items():
        assert recipes.num_failed(role) > 0
        assert "the disk works again" in job.output()
        assert "TRAINING ALONE" not in job.output()
    check_undisturbed(recipes, undisturbed)


def roles() -> tuple[Role, Role]:
    return ("donor", "receiver")


@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_that_an_outage_is_no_silence_of_the_other_job(
    recipes: FaultyRecipes, undisturbed: dict[str, Tensor], error: str
) -> None:
    """Where a teacher can stand in, a silent donor is given up much sooner than ``peer_wait``."""
    jobs = {role: recipes.start(role, "--exchange", "auto") for role in roles()}
    recipes.await_payload(80)
    for role in roles():
        recipes.disturb(role, f"error {error}")
    failing = re.compile(f"DISK FAILS since {OUTAGE_SECONDS // 10}[0-9] of")
    # On a full disk one of the two waits in vain for what the other one cannot write.
    wait_until(lambda: any(failing.search(job.output()) for job in jobs.values()), "20 s of it")
    for role in roles():
        recipes.mend(role)
    for job in jobs.values():
        job.wait(TIMEOUT)
        assert "TRAINING ALONE" not in job.output()
    check_undisturbed(recipes, undisturbed)


@pytest.mark.parametrize("role", roles())
def test_ranks_that_wait_for_a_failing_disk_do_not_time_out(
    recipes: FaultyRecipes, role: Role
) -> None:
    """The main process alone meets the disk; the others must hear from it meanwhile."""
    jobs = {
        each: recipes.start(each, "--rank_timeout", RANK_SECONDS, num_processes=1 + (each == role))
        for each in roles()
    }
    recipes.await_payload(50)
    recipes.disturb(role, "error EROFS")

    def failing_seconds() -> int:
        found = re.findall(r"DISK FAILS since ([0-9]+) of", jobs[role].output())
        return max(map(int, found), default=0)

    wait_until(lambda: failing_seconds() > RANK_SECONDS, "longer than a rank waits")
    recipes.mend(role)
    for job in jobs.values():
        job.wait(TIMEOUT)
        assert "TRAINING ALONE" not in job.output()
    assert recipes.results("0001", role)["num_processes"] == 2
    assert recipes.check_ledger()["applied"] == NUM_STEPS


@pytest.mark.parametrize("role", roles())
def test_a_disk_that_fails_for_good_on_one_side_ends_that_job_alone(
    recipes: FaultyRecipes, role: Role
) -> None:
    patience = ["--peer_wait", STAYS_FULL_SECONDS]
    jobs = {
        "donor": recipes.start("donor", *patience, "--max_train_steps", 2 * NUM_STEPS),
        "receiver": recipes.start("receiver", *patience),
    }
    recipes.await_payload(50)
    recipes.disturb(role, "error EROFS")
    assert jobs[role].wait(TIMEOUT, check=False) == 1
    output = jobs[role].output()
    assert f"error: the disk has failed for {STAYS_FULL_SECONDS} s (--peer_wait)" in output
    assert "mount its file system for writing again" in output
    other: Role = "receiver" if role == "donor" else "donor"
    jobs[other].wait(TIMEOUT)
    assert f"TRAINING ALONE: the {role} fell silent" in jobs[other].output()
    results = recipes.results("0001", other)
    if other == "receiver":
        fates = recipes.check_ledger()
        assert 0 < results["steps_alone"] == NUM_STEPS - fates["applied"]
    else:
        assert 0 < results["windows_alone"] == 2 * NUM_STEPS - results["published"]


def test_a_disk_that_is_read_only_for_a_while_changes_nothing(
    recipes: FaultyRecipes, undisturbed: dict[str, Tensor]
) -> None:
    with small_disk(recipes.path(), mib=8):
        # TensorBoard's open file would keep the system from making the disk read-only.
        jobs = [recipes.start(role, "--report_to", "none") for role in roles()]
        recipes.await_payload(50)
        remount(recipes.path(), "ro")
        wait_until(lambda: any("DISK FAILS" in job.output() for job in jobs), "a failing disk")
        remount(recipes.path(), "rw")
        for job in jobs:
            job.wait(TIMEOUT)
        output = "".join(job.output() for job in jobs)
        assert "Read-only file system" in output
        assert "TRAINING ALONE" not in output
        check_undisturbed(recipes, undisturbed)


def test_a_disk_that_is_frozen_for_a_while_changes_nothing(
    recipes: FaultyRecipes, undisturbed: dict[str, Tensor]
) -> None:
    with loop_disk(recipes.path(), mib=64):
        jobs = [recipes.start(role) for role in roles()]
        recipes.await_payload(50)
        freeze(recipes.path(), FROZEN_SECONDS)
        for job in jobs:
            job.wait(TIMEOUT)
            assert "TRAINING ALONE" not in job.output()
        check_undisturbed(recipes, undisturbed)


def test_a_slow_disk_and_files_that_are_seen_late_change_nothing(
    recipes: FaultyRecipes, undisturbed: dict[str, Tensor]
) -> None:
    recipes.disturb("donor", "late 3")
    recipes.disturb("receiver", "slow 0.005")
    jobs = [recipes.start(role) for role in roles()]
    for job in jobs:
        job.wait(TIMEOUT)
    assert recipes.num_failed("donor") >= 3 * NUM_STEPS
    check_undisturbed(recipes, undisturbed)
