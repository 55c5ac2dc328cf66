"""The recipes as a user starts them: in any order, alone, killed and resumed, on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.launching import Launcher
from tests.oracle import largest_difference
from tests.recipes.running import DONOR, JOINT, RECEIVER, TIMEOUT, Recipes, wait_until


def test_either_order_again_and_equal_to_joint(recipes: Recipes) -> None:
    steps = ["--max_train_steps", 40]
    first = recipes(RECEIVER, *steps)
    wait_until(recipes.path("0001", "bridge", "receiver", "heartbeat").exists, "receiver first")
    recipes(DONOR).wait(TIMEOUT)
    first.wait(TIMEOUT)
    assert "waiting for the donor" in first.output()
    assert "accelerate launch recipes/donor.py" in first.output()

    donor = recipes(DONOR)  # the same commands again: a new run beside the old
    wait_until(recipes.path("0002", "bridge", "donor", "heartbeat").exists, "donor first")
    recipes(RECEIVER, *steps).wait(TIMEOUT)
    donor.wait(TIMEOUT)

    recipes(JOINT, *steps, "--output_dir", recipes.path("joint")).wait(TIMEOUT)
    joint = recipes.weights("joint")
    for run in ("0001", "0002"):
        weights = recipes.weights(run, "receiver")
        assert largest_difference(weights, joint) <= 1e-12
        shared = {name: weights[name] for name in weights if not name.startswith("heads.h1")}
        assert largest_difference(recipes.weights(run, "donor"), shared) == 0.0
        results = recipes.results(run, "receiver")
        assert results["recipe"] == "receiver"
        assert results["completed_steps"] == 40
        assert results["num_processes"] == 1
        assert results["accuracies (%)"].keys() == {"h1", "h2"}
        fates = results["fates"]
        assert fates["applied"] == 40
        settled = sum(fates[fate] for fate in ("applied", "dropped", "rejected", "skipped"))
        assert settled + fates["pending"] == fates["published"]
        assert results["mean_staleness (receiver steps)"] == 0.0
        donated = recipes.results(run, "donor")
        assert donated["published_records"] == fates["published"] + 1, "and an end"
        size = sum(tensor.numel() * tensor.itemsize for tensor in shared.values())
        assert 0 < donated["published_bytes"] - fates["published"] * size < 100_000
        assert 0 < results["published_bytes"] - 41 * size < 100_000, "the weights of 0 to 40 steps"
    assert torch.equal(
        recipes.weights("0001", "receiver")["heads.h2.weight"],
        recipes.weights("0002", "receiver")["heads.h2.weight"],
    )


def test_both_jobs_overlay_in_tensorboard(recipes: Recipes) -> None:
    jobs = [recipes(DONOR), recipes(RECEIVER, "--max_train_steps", 6, "--eval_steps", 3)]
    for job in jobs:
        job.wait(TIMEOUT)
    donor, receiver = (
        EventAccumulator(str(recipes.path("0001", role))).Reload() for role in ("donor", "receiver")
    )
    tags = set(receiver.Tags()["scalars"])
    assert tags - {"fates/pending donor [payloads]"} == {  # one, if the donor was quick
        "accuracy/h1 [%]", "accuracy/h2 [%]", "bridge/payload donor [MiB]",
        "bridge/samples donor [samples]", "bridge/samples own [samples]",
        "bridge/staleness donor [receiver steps]", "bridge/wait [% of the step]", "bridge/wait [s]",
        "events/alarms donor [alarms]", "events/donor present [0 or 1]",
        "events/teacher heads.h2 [0 or 1]", "fates/applied donor [payloads]",
        "fates/published donor [payloads]", "gradient/cosine own donor [backbone]",
        "gradient/donor norm", "gradient/multiplier donor [factor]",
        "gradient/n_r over n_d donor [ratio]", "gradient/own norm", "loss/donor [per sample]",
        "loss/own [per sample]", "train/learning rate",
    }  # fmt: skip
    assert [event.step for event in receiver.Scalars("accuracy/h2 [%]")] == [3, 6]
    losses = [
        {event.step: event.value for event in job.Scalars("loss/donor [per sample]")}
        for job in (donor, receiver)
    ]
    assert set(losses[1]) == {1, 2, 3, 4, 5, 6}
    assert {step: losses[0][step] for step in losses[1]} == losses[1], "the same step, one loss"
    (ended,) = donor.Scalars("accuracy/h2 [%]")
    same = receiver.Scalars("accuracy/h2 [%]")[-1]
    assert (ended.step, ended.value) == (same.step, same.value), "the same weights, one accuracy"
    for job in (donor, receiver):
        shares = [event.value for event in job.Scalars("bridge/wait [% of the step]")]
        assert all(0 <= share <= 100 for share in shares)
        assert any(shares)
    applied = [event.value for event in receiver.Scalars("fates/applied donor [payloads]")]
    assert applied == [1, 2, 3, 4, 5, 6, 6], "after each step, and with the results"
    assert "configuration/settings/text_summary" in receiver.Tags()["tensors"]


@pytest.mark.faults
def test_a_donor_that_was_stopped_for_a_while_is_followed_again(recipes: Recipes) -> None:
    donor = recipes(DONOR)
    receiver = recipes(RECEIVER, "--peer_wait", 2, "--max_train_steps", 1500)
    ledger = recipes.path("0001", "bridge", "receiver", "ledger-0001.jsonl")
    wait_until(ledger.exists, "the first steps")
    for process in donor.processes():
        process.suspend()
    wait_until(lambda: "TRAINING ALONE" in receiver.output(), "going alone")
    for process in donor.processes():
        process.resume()
    receiver.wait(TIMEOUT)
    donor.wait(TIMEOUT)
    output = receiver.output()
    assert "the donor is back" in output
    assert output.count("TRAINING ALONE") == 1
    entries = [json.loads(line) for line in ledger.read_text().splitlines()]
    last = entries[-1]
    assert (last["fate"], last["receiver_step"]) == ("applied", 1499), "lockstep is not restored"
    results = recipes.results("0001", "receiver")
    without = results["steps_alone"] + results["steps_taught"]
    assert without == 1500 - results["fates"]["applied"] > results["steps_taught"] > 0


@pytest.mark.slow
def test_two_ranks_each_equal_joint_on_one(recipes: Recipes) -> None:
    own = ["--max_train_steps", 12, "--per_device_train_batch_size", 6]
    own += ["--lr_backbone", 2e-3, "--lr_head1", 8e-3, "--lr_head2", 2e-2]
    own += ["--lr_scheduler_type", "linear", "--num_warmup_steps", 3]
    donor = ["--per_device_train_batch_size", 7, "--gradient_accumulation_steps", 3]
    jobs = [
        recipes(DONOR, *donor, num_processes=2),
        recipes(RECEIVER, *own, "--gradient_accumulation_steps", 2, num_processes=2),
    ]
    for job in jobs:
        job.wait(TIMEOUT)
    assert recipes.results("0001", "receiver")["num_processes"] == 2
    assert recipes.results("0001", "donor")["num_processes"] == 2
    joint = ["--gradient_accumulation_steps", 2, "--receiver_processes", 2]
    joint += ["--donor_batch_size", 7, "--donor_accumulation_steps", 3, "--donor_processes", 2]
    recipes(JOINT, *own, *joint, "--output_dir", recipes.path("joint")).wait(TIMEOUT)
    difference = largest_difference(recipes.weights("0001", "receiver"), recipes.weights("joint"))
    assert difference <= 1e-12


@pytest.mark.slow
def test_bf16_on_either_side(recipes: Recipes) -> None:
    common = ["--dtype", "float32", "--max_train_steps", 20]
    for name, donor_precision, receiver_precision in (
        ("plain", "no", "no"), ("donor", "bf16", "no"), ("receiver", "no", "bf16"),
    ):  # fmt: skip
        jobs = [
            recipes(DONOR, *common[:2], "--run", name, "--mixed_precision", donor_precision),
            recipes(RECEIVER, *common, "--run", name, "--mixed_precision", receiver_precision),
        ]
        for job in jobs:
            job.wait(TIMEOUT)
        assert recipes.results(name, "receiver")["fates"]["applied"] == 20
    plain = recipes.weights("plain", "receiver")
    for name in ("donor", "receiver"):
        weights = recipes.weights(name, "receiver")
        assert all(tensor.dtype == torch.float32 for tensor in weights.values())
        # Rounding of 8 bits shows, and does not lead far astray.
        assert 1e-5 < largest_difference(weights, plain) < 0.1


@pytest.mark.parametrize("recipe", [pytest.param(DONOR, marks=pytest.mark.slow), RECEIVER])
def test_one_alone_trains_alone_with_a_loud_warning(recipes: Recipes, recipe: str) -> None:
    job = recipes(recipe, "--peer_wait", 1, "--max_train_steps", 5)
    job.wait(TIMEOUT)
    assert "TRAINING ALONE" in job.output()
    role = Path(recipe).stem
    assert recipes.results("0001", role)["completed_steps"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [DONOR, RECEIVER])
def test_one_alone_ends_with_an_error_where_the_peer_is_required(
    recipes: Recipes, recipe: str
) -> None:
    job = recipes(recipe, "--peer_wait", 1, "--require_peer", num_processes=2)
    assert job.wait(TIMEOUT, check=False) != 0
    assert "did not come for 1 s" in job.output()
    assert "--require_peer" in job.output()


CHECKPOINTS = ["--checkpointing_steps", 40, "--checkpoints_total_limit", 2]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights of a run that nobody disturbs."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    with Launcher(directory) as launcher:
        recipes = Recipes(launcher, directory)
        flags = ["--exchange", "gradient"]
        jobs = [recipes(DONOR, *flags), recipes(RECEIVER, *flags, "--max_train_steps", 400)]
        for job in jobs:
            job.wait(TIMEOUT)
    return recipes.weights("0001", "receiver")


@pytest.mark.parametrize(
    "killed",
    [
        "both",
        *(pytest.param(job, marks=pytest.mark.faults) for job in ("receiver", "donor", "neither")),
    ],
)
def test_a_resume_gives_the_uninterrupted_weights_bitwise(
    recipes: Recipes, uninterrupted: dict[str, Tensor], killed: str
) -> None:
    flags = ["--exchange", "gradient", *CHECKPOINTS]  # no teacher, however long a resume takes
    donor = recipes(DONOR, *flags)
    num_steps = 120 if killed == "neither" else 400
    receiver = recipes(RECEIVER, *flags, "--max_train_steps", num_steps)
    if killed == "neither":  # both come to an orderly end, and go on from there
        receiver.wait(TIMEOUT)
        donor.wait(TIMEOUT)
    else:
        for role in ("receiver", "donor"):
            wait_until(recipes.path("0001", role, "step_80").exists, f"{role}'s second checkpoint")
        if killed in ("both", "donor"):
            donor.kill()
        if killed in ("both", "receiver"):
            receiver.kill()
        assert not recipes.path("0001", "receiver", "results.json").exists(), "killed too late"
    resume = ["--resume_from_checkpoint", "latest"]
    if killed != "receiver":
        donor = recipes(DONOR, *flags, *resume)
    if killed != "donor":
        receiver = recipes(RECEIVER, *flags, "--max_train_steps", 400, *resume)
    receiver.wait(TIMEOUT)
    donor.wait(TIMEOUT)
    assert largest_difference(recipes.weights("0001", "receiver"), uninterrupted) == 0.0
    fates = recipes.results("0001", "receiver")["fates"]
    assert fates["applied"] == 400
    assert (fates["dropped"], fates["rejected"], fates["skipped"]) == (0, 0, 0)
    assert [path.name for path in recipes.path().iterdir()] == ["0001"]
