"""What a user gets wrong: a clear error with the remedy, and an exit status other than 0."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from tests.launching import Job
from tests.recipes.running import DONOR, RECEIVER, TIMEOUT, Recipes, wait_until


def check_refused(job: Job, *phrases: str) -> None:
    """The job ended with an error that says all of this, and without a traceback of ours."""
    assert job.wait(TIMEOUT, check=False) != 0
    output = job.output()
    for phrase in phrases:
        assert phrase in output, f"{phrase!r} is not in:\n{output}"
    ours, _, _ = output.partition("error: ")
    assert "Traceback" not in ours, output


@pytest.mark.slow
def test_jobs_that_do_not_fit_together_and_a_role_that_is_taken(recipes: Recipes) -> None:
    receiver = recipes(RECEIVER, "--run", "mine")
    wait_until(recipes.path("mine", "bridge", "receiver", "heartbeat").exists, "the receiver")
    unfit = recipes(DONOR, "--run", "mine", "--task", "overlap")
    other_scope = recipes(DONOR, "--run", "mine", "--scope", "head")
    rival = recipes(RECEIVER, "--run", "mine")
    check_refused(
        unfit, "heads.h2.weight", "donor float64 (10, 48), receiver float64 (5, 48)", "--run NAME"
    )
    check_refused(other_scope, "scope: donor 'head', receiver 'all'")
    check_refused(rival, "has a living receiver", "leave --run")
    assert receiver.is_running(), receiver.output()


@pytest.mark.slow
def test_a_run_that_is_over(recipes: Recipes) -> None:
    recipes(RECEIVER, "--run", "old", "--peer_wait", 0.2, "--max_train_steps", 2).wait(TIMEOUT)
    for recipe in (DONOR, RECEIVER):
        check_refused(recipes(recipe, "--run", "old"), "run 'old' is over", "leave --run out")


def test_settings_that_make_no_sense(recipes: Recipes) -> None:
    negative = recipes(RECEIVER, "--max_staleness", -1)
    pooled_sum = recipes(RECEIVER, "--rescale", "pool", "--loss_reduction", "sum")
    check_refused(negative, "receiver.py: error: max_staleness must not be negative, got -1")
    headless = recipes(RECEIVER, "--aggregate", "pcgrad", "--scope", "head")
    check_refused(headless, "receiver.py: error: aggregate 'pcgrad' weighs two", "scope 'all'")
    check_refused(pooled_sum, "receiver.py: error: rescale rule 'pool'", "use 'append'")


def test_places_and_checkpoints_that_are_not_there(recipes: Recipes, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    unwritable = recipes(DONOR, "--runs_dir", "file/runs")
    nowhere = recipes(RECEIVER, "--resume_from_checkpoint", "nowhere")
    check_refused(unwritable, "cannot use the runs directory", "--runs_dir")
    check_refused(nowhere, "nowhere is no checkpoint")


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Eight grey images of 8 x 8, with a label that is out of range."""
    path = tmp_path / "own.parquet"
    image = [[0.5] * 8] * 8
    columns = {"image": [image] * 8, "digit": [0, 1, 2, 3, 4, 5, 11, 7]}
    datasets.Dataset.from_dict(columns).to_parquet(path)
    return path


def test_data_of_ones_own(recipes: Recipes, parquet: Path) -> None:
    own = ["--dataset_name", parquet, "--num_classes", 10, 5]
    missing = recipes(RECEIVER, *own)
    out_of_range = recipes(RECEIVER, *own, "--label_column", "digit")
    check_refused(missing, "no column 'label'", "['image', 'digit']", "--label_column")
    check_refused(out_of_range, "label 11 in row 6", "head 'h1'", "--num_classes")
