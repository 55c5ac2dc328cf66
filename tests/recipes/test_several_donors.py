"""Several donors by the recipes' flags: a shard each for one head, and a third head."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import datasets
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recipes import donor, joint, receiver
from tests.oracle import largest_difference
from tests.recipes.running import DONOR, JOINT, RECEIVER, TIMEOUT, Recipes

STEPS = 50  # more than an epoch of a shard, whose last batch is a short one
SHARDS = {"east": ["--shard", "0/2"], "west": ["--shard", "1/2"]}
PARITY = {"parity": ["--head", "h3"]}


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        (receiver, "--donor_heads h2 h2", "--donor_heads names a head twice: h2 h2"),
        (receiver, "--donor_heads h1", "invalid choice: 'h1'"),
        (
            receiver,
            "--donor_heads h2 h3 --donor_weight heads.h2=1",
            "donor_weight has no ['heads.h3'], only ['heads.h2']",
        ),
        (
            receiver,
            "--donor_weight heads.h2=1,heads.h3=1",
            "donor_weight names ['heads.h3'], but donors train ['heads.h2']",
        ),
        (joint, "--donor_weight heads.h2=1,h2=1", "donor_weight names ['h2'], but donors train"),
        (donor, "--shard 2/2", "argument --shard: expected INDEX/COUNT"),
        (joint, "--donors h2 h3 --donor_weight heads.h2=1", "donor_weight has no ['heads.h3']"),
        (joint, "--task pair --donors h3", "--donors is about two jobs' data"),
        (
            joint,
            "--dataset_name x --donor_dataset_name y --num_classes 9 8 7 --donors h2 h3",
            "--donor_dataset_name is of one head",
        ),
    ],
)
def test_flags_that_make_no_sense(
    recipe: ModuleType,
    flags: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [recipe.__name__, *flags.split()])
    with pytest.raises(SystemExit):
        recipe.parse_arguments()
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_shards_of_one_head_and_another_head_equal_joint(recipes: Recipes) -> None:
    flags = ["--max_train_steps", STEPS, "--lr_head3", 2e-2]
    flags += ["--donor_weight", "heads.h2=0.7,heads.h3=0.3"]
    donors = {**SHARDS, **PARITY}
    jobs = {
        name: recipes(DONOR, "--donor_name", name, "--per_device_train_batch_size", 22, *part)
        for name, part in donors.items()
    }
    jobs["receiver"] = recipes(RECEIVER, *flags, "--num_donors", 3, "--donor_heads", "h2", "h3")
    for job in jobs.values():
        job.wait(TIMEOUT)
    for name, size in {"east": 600, "west": 600, "parity": 1200}.items():
        assert f"Num examples = {size}\n" in jobs[name].output()

    results = recipes.results("0001", "receiver")
    assert (results["completed_steps"], results["steps_alone"]) == (STEPS, 0)
    applied = {name: fates["applied"] for name, fates in results["fates_by_donor"].items()}
    assert applied == dict.fromkeys(donors, STEPS)
    accuracies = results["accuracies (%)"]
    assert list(accuracies) == ["h1", "h2", "h3"]
    assert accuracies["h2"] > 60, "of five classes"
    assert accuracies["h3"] > 75, "of two"
    assert list(recipes.results("0001", "parity")["accuracies (%)"]) == ["h3"]
    curves = EventAccumulator(str(recipes.path("0001", "receiver"))).Reload()
    wanted = {f"accuracy/{head} [%]" for head in accuracies}
    wanted |= {f"loss/{name} [per sample]" for name in donors}
    wanted |= {f"train/learning rate {part}" for part in ("backbone", *accuracies)}
    assert wanted <= set(curves.Tags()["scalars"])

    flags += ["--donors", "h2", "h2", "h3", "--donor_batch_size", 22]
    recipes(JOINT, *flags, "--output_dir", recipes.path("joint")).wait(TIMEOUT)
    weights = recipes.weights("0001", "receiver")
    assert largest_difference(weights, recipes.weights("joint")) <= 1e-12


@pytest.mark.slow
def test_that_each_head_gets_a_teacher(recipes: Recipes) -> None:
    flags = ["--exchange", "distill"]
    donors = {"east": SHARDS["east"], **PARITY}
    for name, part in donors.items():
        bound = ["--peer_wait", 0.2, "--max_train_steps", 30]
        recipes(DONOR, *flags, "--run", "taught", "--donor_name", name, *part, *bound).wait(TIMEOUT)
    heads = ["--num_donors", 2, "--donor_heads", "h2", "h3"]
    recipes(RECEIVER, *flags, "--run", "taught", *heads, "--max_train_steps", 30).wait(TIMEOUT)
    results = recipes.results("taught", "receiver")
    assert (results["steps_taught"], results["steps_alone"]) == (30, 0)
    curves = EventAccumulator(str(recipes.path("taught", "receiver"))).Reload()
    for name in donors:
        tag = f"loss/teacher {name} [per sample]"
        first, *_, last = [event.value for event in curves.Scalars(tag)]
        assert last < first / 2


@pytest.mark.slow
def test_shards_of_data_of_ones_own(recipes: Recipes, tmp_path: Path) -> None:
    columns = {"image": [[[0.5] * 8] * 8] * 7, "label": [0, 0, 0, 0, 1, 1, 1]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "own.parquet")
    flags = ["--dataset_name", "own.parquet", "--num_classes", 10, 5, 2, "--head", "h3"]
    flags += ["--eval_split", "train", "--peer_wait", 0.2, "--max_train_steps", 3]
    job = recipes(DONOR, *flags, "--shard", "1/2")
    job.wait(TIMEOUT)
    assert "Num examples = 3\n" in job.output()
    results = recipes.results("0001", "donor")
    assert list(results["accuracies (%)"]) == ["h3"]
    refused = recipes(DONOR, *flags, "--shard", "7/8")
    assert refused.wait(TIMEOUT, check=False) != 0
    assert "error: shard 7/8 is empty: there are 7 rows" in refused.output()
    assert "Traceback" not in refused.output().partition("error: ")[0]
