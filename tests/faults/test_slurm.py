"""Both jobs of a pair in the hands of a real Slurm, whose four nodes are this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.running import LOCKSTEP, FaultyRecipes
from tests.launching import Launcher
from tests.oracle import largest_difference
from tests.recipes.running import DONOR, JOINT, RECEIVER, TIMEOUT
from tests.recipes.test_slurm import check_equal_to_joint
from tests.slurm_daemons import CPUS, BatchJob, SlurmCluster, slurm_cluster

pytestmark = pytest.mark.faults

NUM_STEPS = 200
STEPS = ("--max_train_steps", NUM_STEPS, "--dtype", "float64", "--eval_steps", 1000)


@pytest.fixture
def cluster(launcher: Launcher, tmp_path: Path) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path / "slurm", launcher) as cluster:
        yield cluster


@pytest.fixture
def line(recipes: FaultyRecipes) -> list[object]:
    """What is submitted of either recipe."""
    run = ["--runs_dir", recipes.path(), "--run", "first", "--require_peer"]
    return [*STEPS, *LOCKSTEP, *run, "--checkpointing_steps", 10]


def test_that_both_jobs_on_two_nodes_each_equal_joint_training(
    recipes: FaultyRecipes, cluster: SlurmCluster
) -> None:
    check_equal_to_joint(recipes, cluster)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < CPUS, reason=f"needs {CPUS} cores")
def test_that_ranks_may_use_all_the_cores_that_are_asked_for(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    script = tmp_path / "cores.py"
    script.write_text("import os; print('cores:', len(os.sched_getaffinity(0)))")
    job = cluster.submit(str(script))
    job.wait(TIMEOUT)
    assert job.output().count(f"cores: {CPUS}") == 2


def check_farewell(receiver: BatchJob, donor: BatchJob, state: str) -> None:
    """The receiver has got SIGTERM in time, and the donor knows."""
    assert receiver.wait(TIMEOUT, check=False) == state
    assert "SIGTERM: go on with --resume_from_checkpoint" in receiver.output()
    donor.wait(TIMEOUT)
    assert "stopped: the receiver has ended" in donor.output()


@pytest.mark.timeout(600)  # five jobs
def test_that_a_job_whose_time_ends_goes_on_when_it_is_submitted_again(
    recipes: FaultyRecipes, cluster: SlurmCluster, line: list[object]
) -> None:
    receiver, donor = (cluster.submit(recipe, *line) for recipe in (RECEIVER, DONOR))
    recipes.await_payload(30, "first")
    receiver.cancel("--signal=TERM")  # as --signal=TERM@60 does by itself
    check_farewell(receiver, donor, "FAILED")
    assert "Terminating StepId" not in receiver.output(), "a second SIGTERM would end a saving"
    assert not recipes.path("first", "receiver", "results.json").exists(), "stopped too late"

    line += ["--resume_from_checkpoint", "latest"]
    for job in [cluster.submit(recipe, *line) for recipe in (DONOR, RECEIVER)]:
        job.wait(TIMEOUT)
    assert recipes.results("first", "receiver")["fates"]["applied"] == NUM_STEPS
    ranks = ["--receiver_processes", 2, "--donor_processes", 2]
    recipes(JOINT, *STEPS, *ranks, "--output_dir", recipes.path("joint")).wait(TIMEOUT)
    weights = recipes.weights("first", "receiver")
    assert largest_difference(weights, recipes.weights("joint")) <= 1e-11


def test_that_a_cancelled_receiver_says_farewell_to_its_donor(
    recipes: FaultyRecipes, cluster: SlurmCluster, line: list[object]
) -> None:
    receiver, donor = (cluster.submit(recipe, *line) for recipe in (RECEIVER, DONOR))
    recipes.await_payload(1, "first")
    receiver.cancel()
    check_farewell(receiver, donor, "CANCELLED")
