"""The Slurm script: both jobs of a pair on two machines each, with this one as both machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching import Launcher
from tests.oracle import largest_difference
from tests.recipes.running import DONOR, JOINT, RECEIVER, TIMEOUT, Recipes
from tests.slurm import Cluster
from tests.slurm_daemons import SlurmCluster


def check_equal_to_joint(recipes: Recipes, cluster: Cluster | SlurmCluster) -> None:
    """Ten steps of both jobs on the cluster, and of joint training here."""
    own = ["--max_train_steps", 10, "--dtype", "float64", "--eval_steps", 1000]
    pair = [*own, "--runs_dir", recipes.path(), "--run", "first", "--require_peer"]

    jobs = [cluster.submit(recipe, *pair) for recipe in (RECEIVER, DONOR)]
    ranks = ["--receiver_processes", 2, "--donor_processes", 2]
    joint = recipes(JOINT, *own[:2], *ranks, "--output_dir", recipes.path("joint"))
    for job in [*jobs, joint]:
        job.wait(TIMEOUT)

    for job, role in zip(jobs, ("receiver", "donor"), strict=True):
        assert "Num processes = 2" in job.output()
        assert recipes.results("first", role)["num_processes"] == 2
    assert recipes.results("first", "receiver")["fates"]["applied"] == 10
    weights = recipes.weights("first", "receiver")
    assert largest_difference(weights, recipes.weights("joint")) <= 1e-12


@pytest.mark.slow
def test_that_both_jobs_on_two_machines_each_equal_joint_training(
    recipes: Recipes, launcher: Launcher, tmp_path: Path
) -> None:
    check_equal_to_joint(recipes, Cluster(tmp_path, launcher))
