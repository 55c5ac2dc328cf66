"""``recipes/joint.py --method``: each one launched, on two ranks as on one, and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.launching import Job, Launcher
from tests.recipes.running import JOINT, Recipes
from tests.recipes.test_bad_input import check_refused

STEPS = 8
ROTOGRAD = ("--method=rotograd", "--burn_in_period=3", "--coop_after=6")


class Runs:
    """Starts short jobs, each with an output directory of its name."""

    def __init__(self, launcher: Launcher, directory: Path) -> None:
        self._launcher, self._directory = launcher, directory

    def __call__(self, name: str, *flags: str, num_processes: int = 1) -> Job:
        common = ["--dtype=float64", f"--max_train_steps={STEPS}", "--eval_steps=1000"]
        common += ["--learning_rate=0.01", f"--output_dir={self._directory / name}"]
        return self._launcher(JOINT, *common, *flags, num_processes=num_processes)

    def results(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self._directory / name / "results.json").read_bytes())
        return content

    def difference(self, name: str, other: str) -> float:
        """Of the final weights, rotations and steps remembered, the largest."""
        first, second = (
            load_file(self._directory / run / "model.safetensors") for run in (name, other)
        )
        assert set(first) == set(second)
        return max(float((first[key] - second[key]).nan_to_num(0.0).abs().max()) for key in first)

    def tags(self, name: str) -> set[str]:
        events = EventAccumulator(str(self._directory / name)).Reload()
        return {tag.replace("[", "(").replace("]", ")") for tag in events.Tags()["scalars"]}


@pytest.fixture
def runs(launcher: Launcher, tmp_path: Path) -> Runs:
    return Runs(launcher, tmp_path)


def finish(*jobs: Job) -> None:
    for job in jobs:
        job.wait(180)


@pytest.mark.slow
def test_methods_on_five_tasks(runs: Runs, tmp_path: Path) -> None:
    pair = ("--task=pair", "--per_device_train_batch_size=9", "--max_grad_norm=2")
    rotograd = (*pair, *ROTOGRAD, "--checkpointing_steps=5")
    finish(runs("rotograd", *rotograd), runs("pcgrad", *pair, "--method=pcgrad"))
    finish(runs("two ranks", *rotograd, num_processes=2))
    resume = f"--resume_from_checkpoint={tmp_path / 'rotograd' / 'step_5'}"
    finish(runs("resumed", *rotograd, resume), runs("rotate", *pair, "--method=rotate"))
    alpha = ("--method=rotogradnorm", "--alpha=0.5")
    finish(runs("rotogradnorm", *pair, *alpha), runs("upgrad", *pair, "--method=upgrad"))

    metrics = {"accuracy/left (%)", "accuracy/right (%)", "MSE/sum", "F1/parity (%)", "MSE/pixels"}
    for name in ("rotograd", "pcgrad", "rotate", "rotogradnorm", "upgrad"):
        results = runs.results(name)
        assert set(results["metrics"]) == metrics
        assert set(results["accuracies (%)"]) == {"left", "right"}
        assert (results["completed_steps"], results["num_processes"]) == (STEPS, 1)
    for one, other in (("rotate", "rotograd"), ("pcgrad", "upgrad")):
        assert runs.difference(one, other) > 1e-3

    assert runs.results("two ranks")["num_processes"] == 2
    assert runs.difference("rotograd", "two ranks") < 1e-9
    assert runs.results("two ranks")["metrics"] == pytest.approx(
        runs.results("rotograd")["metrics"], rel=1e-9
    )
    assert runs.difference("rotograd", "resumed") == 0.0
    matrices = load_file(tmp_path / "rotograd" / "model.safetensors")["rotations.matrices"]
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype)
    assert float((matrices - identity).abs().max()) > 0.01  # they did turn
    torch.testing.assert_close(matrices.mT @ matrices, identity.expand_as(matrices))

    common = {"loss/left (per sample)", "loss/pixels (per sample)", *metrics}
    common |= {"gradient/parity weight (factor)"}
    assert common | {"gradient/sum norm (features)"} <= runs.tags("rotograd")
    assert "gradient/cosine before rotation left right (features)" in runs.tags("rotograd")
    assert "gradient/orthogonality error of rotations" in runs.tags("rotograd")
    cosines = {"gradient/cosine sum pixels (backbone)", "gradient/left norm (backbone)"}
    assert common | cosines <= runs.tags("pcgrad")


@pytest.mark.slow
def test_a_task_that_one_rank_has_no_sample_of(runs: Runs) -> None:
    heads = ("--task=digits", "--per_device_train_batch_size=1", "--donor_batch_size=5")
    pcgrad = (*heads, "--method=pcgrad")
    finish(runs("one", *pcgrad), runs("two", *pcgrad, num_processes=2))
    assert runs.results("two")["num_processes"] == 2
    assert runs.difference("one", "two") < 1e-9


@pytest.mark.slow
def test_that_a_checkpoint_of_another_method_is_refused(runs: Runs, tmp_path: Path) -> None:
    finish(runs("first", "--checkpointing_steps=3"))
    resume = f"--resume_from_checkpoint={tmp_path / 'first' / 'step_6'}"
    jobs = {method: runs(method, f"--method={method}", resume) for method in ("rotograd", "pcgrad")}
    for method, job in jobs.items():
        check_refused(
            job, f"step_6 is a checkpoint of --method sum, and this job has --method {method}"
        )
    check_refused(runs("absent", f"{resume}0"), "step_60 is no checkpoint")


def test_flags_of_two_jobs_for_five_tasks(recipes: Recipes) -> None:
    rescaled = recipes(JOINT, "--task", "pair", "--rescale", "pool")
    check_refused(rescaled, "joint.py: error: --rescale is about two jobs' data", "--task pair")
