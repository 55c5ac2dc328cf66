"""Donor and receiver with ``accelerate_configs/fsdp2.yaml``, on two ranks of the CPU each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching import Job, Launcher
from tests.oracle import largest_difference
from tests.recipes.running import DONOR, JOINT, RECEIVER, ROOT, TIMEOUT, Recipes, wait_until
from tests.recipes.test_bad_input import check_refused

CONFIG = ROOT / "accelerate_configs" / "fsdp2.yaml"
SHARDING = ROOT / "tests" / "jobs" / "fsdp2_recipe.py"  # makes Accelerate shard on the CPU too


def test_that_the_configuration_on_the_cpu_is_not_run_as_something_else(
    launcher: Launcher, tmp_path: Path
) -> None:
    job = launcher(ROOT / DONOR, num_processes=2, cwd=tmp_path, config=CONFIG)
    check_refused(job, "FSDP is configured", "on device cpu", "would train as MULTI_CPU")
    assert not (tmp_path / "runs").exists()


@pytest.mark.faults
def test_that_a_teacher_stands_in_for_a_killed_donor(
    recipes: Recipes, launcher: Launcher, tmp_path: Path
) -> None:
    donor = recipes(DONOR)
    receiver = launcher(
        SHARDING, ROOT / RECEIVER, "--dtype", "float64", "--report_to", "none", "--peer_wait", 3,
        "--max_train_steps", 300, num_processes=2, cwd=tmp_path, config=CONFIG,
    )  # fmt: skip
    ledger = recipes.path("0001", "bridge", "receiver", "ledger-0001.jsonl")
    wait_until(lambda: ledger.exists() and len(ledger.read_text().splitlines()) > 50, "50 payloads")
    donor.kill()
    receiver.wait(TIMEOUT)
    assert "on heads.h2 learns from a teacher" in receiver.output()
    results = recipes.results("0001", "receiver")
    assert results["num_processes"] == 2
    assert (results["steps_alone"], results["steps_taught"] > 0) == (1, True)
    assert results["fates"]["applied"] + 1 + results["steps_taught"] == 300
    assert results["accuracies (%)"]["h2"] > 80


@pytest.mark.faults
def test_that_a_killed_receiver_goes_on_to_the_weights_of_joint_training(
    recipes: Recipes, launcher: Launcher, tmp_path: Path
) -> None:
    own = ["--per_device_train_batch_size", 6, "--gradient_accumulation_steps", 2]
    own += ["--max_train_steps", 8]

    def start(recipe: str, *flags: object) -> Job:
        common = ["--dtype", "float64", "--eval_steps", 3, "--checkpointing_steps", 4]
        common += ["--report_to", "none"]
        return launcher(
            SHARDING, ROOT / recipe, *common, *flags, num_processes=2, cwd=tmp_path, config=CONFIG
        )

    donor = start(
        DONOR, "--per_device_train_batch_size", 7, "--gradient_accumulation_steps", 3,
        "--peer_wait", TIMEOUT,
    )  # fmt: skip
    receiver = start(RECEIVER, *own)
    directory = recipes.path("0001", "receiver")
    wait_until(directory.joinpath("step_4").exists, "the first checkpoint")
    receiver.kill()
    assert not directory.joinpath("results.json").exists(), "killed too late"
    receiver = start(RECEIVER, *own, "--resume_from_checkpoint", "latest")
    receiver.wait(TIMEOUT)
    donor.wait(TIMEOUT)
    assert "resumed from" in receiver.output()
    parts = directory.joinpath("step_8", "pytorch_model_fsdp_0").glob("*.distcp")
    assert len(list(parts)) == 2, "not every rank has written its part"

    job = recipes(
        JOINT, *own, "--receiver_processes", 2, "--donor_processes", 2,
        "--donor_batch_size", 7, "--donor_accumulation_steps", 3,
        "--output_dir", recipes.path("joint"),
    )  # fmt: skip
    job.wait(TIMEOUT)
    weights = recipes.weights("0001", "receiver")
    assert largest_difference(weights, recipes.weights("joint")) <= 1e-12
    shared = {name: weights[name] for name in weights if not name.startswith("heads.h1")}
    assert largest_difference(recipes.weights("0001", "donor"), shared) == 0.0
    found, expected = recipes.results("0001", "receiver"), recipes.results("joint")
    assert found["accuracies (%)"] == expected["accuracies (%)"]
    assert found["fates"]["applied"] == 8
