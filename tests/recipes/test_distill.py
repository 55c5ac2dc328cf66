"""The receiver's recipe with a donor that has finished: its weights teach."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.launching import Launcher
from tests.recipes.running import DONOR, RECEIVER, ROOT, TIMEOUT, Recipes, wait_until
from tests.recipes.test_fsdp2 import CONFIG, SHARDING
from tests.terms import distill_terms
from toolkit import BridgeConfig
from toolkit.bridge.digests import digest_tensors
from toolkit.bridge.payload import Header, write_record
from toolkit.bridge.runs import attach
from toolkit.bridge.transport import DirectoryTransport
from toolkit.models import build_model

HEAD = "heads.h2"
FLAGS = ("--exchange", "distill", "--temperature", 3, "--distill_loss", "kl")


def teach(runs_dir: Path, tensors: dict[str, Tensor], run: str = "0001") -> None:
    """Leave a donor's weights and its end in a run."""
    config = BridgeConfig(runs_dir=runs_dir, run=run, exchange="distill")
    attachment = attach("donor", config, distill_terms(HEAD), {})
    transport = DirectoryTransport(attachment.run_dir / "bridge")
    header = Header(
        kind="weights", run_id=attachment.run_id, job="donor.weights", sequence=0, attempt=1,
        receiver_step=0, weights_digest=digest_tensors(tensors), head=HEAD, donor_step=77,
    )  # fmt: skip
    end = dataclasses.replace(header, kind="end", job="donor")
    for record, content in ((header, tensors), (end, {})):
        transport.open_stream(record.job)
        transport.publish(record.job, 0, partial(write_record, header=record, tensors=content))


def test_that_a_finished_donor_teaches(recipes: Recipes) -> None:
    model = build_model((1, 8, 8), {"h2": 5}, seed=9).double()
    teach(recipes.path(), dict(model.state_dict()))
    job = recipes(RECEIVER, *FLAGS, "--max_train_steps", 6, "--eval_steps", 3)
    job.wait(TIMEOUT)
    assert "the donor teaches with its weights of step 77" in job.output()
    results = recipes.results("0001", "receiver")
    assert (results["completed_steps"], results["steps_alone"]) == (6, 0)
    curves = EventAccumulator(str(recipes.path("0001", "receiver"))).Reload()
    assert set(curves.Tags()["scalars"]) == {
        "accuracy/h1 [%]", "accuracy/h2 [%]", "bridge/samples own [samples]",
        "bridge/teacher age donor [receiver steps]", "bridge/teacher version donor [donor steps]",
        "bridge/wait [% of the step]", "bridge/wait [s]", "events/teacher heads.h2 [0 or 1]",
        "loss/own [per sample]", "loss/teacher donor [per sample]", "train/learning rate",
    }  # fmt: skip
    losses = [event.value for event in curves.Scalars("loss/teacher donor [per sample]")]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_that_two_ranks_learn_from_a_donor_that_has_left(
    recipes: Recipes, launcher: Launcher, tmp_path: Path
) -> None:
    steps = ["--max_train_steps", 300]
    donor = ["--exchange", "distill", "--publish_every", 50, "--peer_wait", 1]
    recipes(DONOR, *donor, *steps).wait(TIMEOUT)
    assert recipes.results("0001", "donor")["accuracies (%)"]["h2"] > 85
    job = recipes(RECEIVER, *FLAGS, *steps, num_processes=2)
    job.wait(TIMEOUT)
    assert "the donor teaches with its weights of step 300" in job.output()
    assert recipes.results("0001", "receiver")["accuracies (%)"]["h2"] > 80

    teach(recipes.path(), recipes.weights("0001", "donor"), "0002")
    launcher(
        SHARDING, ROOT / RECEIVER, "--dtype", "float64", "--report_to", "none", *FLAGS,
        "--max_train_steps", 100, num_processes=2, cwd=tmp_path, config=CONFIG,
    ).wait(TIMEOUT)  # fmt: skip
    assert recipes.results("0002", "receiver")["accuracies (%)"]["h2"] > 50


@pytest.mark.slow
@pytest.mark.parametrize("first", [DONOR, RECEIVER], ids=["donor first", "receiver first"])
def test_that_both_jobs_find_each_other(recipes: Recipes, first: str) -> None:
    flags: dict[str, list[object]] = {
        DONOR: ["--exchange", "distill", "--publish_every", 25, "--max_train_steps", 10**6],
        RECEIVER: [*FLAGS, "--max_train_steps", 400],
    }
    one = recipes(first, *flags[first])
    wait_until(lambda: list(recipes.path().glob("0001/bridge/*/heartbeat")), f"{first} first")
    (second,) = {DONOR, RECEIVER} - {first}
    other = recipes(second, *flags[second])
    for job in (one, other):
        job.wait(TIMEOUT)
    results = recipes.results("0001", "receiver")
    assert (results["completed_steps"], results["steps_alone"]) == (400, 0)
    curves = EventAccumulator(str(recipes.path("0001", "receiver"))).Reload()
    donor_steps = [
        event.value for event in curves.Scalars("bridge/teacher version donor [donor steps]")
    ]
    assert donor_steps == sorted(donor_steps)
    assert len(set(donor_steps)) > 1, "the teacher was never refreshed"
