"""Every exchange in every start order: both jobs end well and say what they did."""

from __future__ import annotations

from typing import Any

import pytest

from tests.launching import Job
from tests.recipes.running import DONOR, RECEIVER, TIMEOUT, Recipes, wait_until
from toolkit.bridge.config import EXCHANGES

LOCAL_STEPS = 4
every_exchange = pytest.mark.parametrize("exchange", EXCHANGES)


def flags(exchange: str) -> list[object]:
    """What both jobs are given."""
    rounds = ["--local_steps", LOCAL_STEPS] if exchange == "delta" else []
    return ["--report_to", "none", "--exchange", exchange, *rounds]


def end(job: Job) -> str:
    """Wait for the job's end, with status 0; what it printed."""
    job.wait(TIMEOUT)
    output = job.output()
    assert "Traceback" not in output
    return output


def check_sums(recipes: Recipes, run: str, exchange: str, num_steps: int) -> dict[str, Any]:
    """Every step of the receiver, and every payload, is accounted for once; its results."""
    results = recipes.results(run, "receiver")
    assert results["completed_steps"] == num_steps
    fates = results["fates"]
    settled = sum(fates[fate] for fate in ("applied", "dropped", "rejected", "skipped"))
    assert settled + fates["pending"] == fates["published"]
    assert fates["rejected"] == fates["alien"] == 0
    given = fates["applied"] * (LOCAL_STEPS if exchange == "delta" else 1)
    assert given + results["steps_alone"] + results["steps_taught"] == num_steps
    trail = recipes.path(run, "bridge", "receiver", "ledger-0001.jsonl")
    entries = trail.read_text().splitlines() if trail.exists() else []
    assert len(entries) == settled
    assert (recipes.path(run, "receiver") / "model.safetensors").exists()
    return results


@pytest.mark.slow
@every_exchange
def test_a_receiver_alone(recipes: Recipes, exchange: str) -> None:
    output = end(recipes(RECEIVER, *flags(exchange), "--peer_wait", 2, "--max_train_steps", 8))
    assert output.count("TRAINING ALONE: the donor did not come for 2 s") == 1
    assert "steps alone: 8, with a teacher: 0" in output
    results = check_sums(recipes, "0001", exchange, 8)
    assert results["steps_alone"] == 8
    assert results["fates"]["published"] == 0


@pytest.mark.slow
@every_exchange
def test_a_donor_that_came_first_and_has_finished(recipes: Recipes, exchange: str) -> None:
    common = [*flags(exchange), "--peer_wait", 2]
    output = end(recipes(DONOR, *common, "--max_train_steps", 12))
    donated = recipes.results("0001", "donor")
    assert donated["completed_steps"] == donated["windows_alone"] == 12
    assert donated["published"] == (12 if exchange == "head" else 0)
    follows = exchange in ("gradient", "delta", "auto")
    assert output.count("TRAINING ALONE: the receiver did not come for 2 s") == follows

    num_steps = 400
    output = end(recipes(RECEIVER, *common, "--max_train_steps", num_steps))
    if exchange in ("gradient", "delta"):
        results = check_sums(recipes, "0002", exchange, num_steps)
        assert output.count("TRAINING ALONE: the donor did not come for 2 s") == 1
        assert results["steps_alone"] == num_steps
        return
    results = check_sums(recipes, "0001", exchange, num_steps)
    assert [path.name for path in recipes.path().iterdir()] == ["0001"]
    if exchange == "head":
        assert results["fates"]["applied"] == results["fates"]["published"] == 12
        assert output.count("TRAINING ALONE: the donor has ended. From receiver step 12 on") == 1
        return
    assert "the donor teaches with its weights of step 12" in output
    if exchange == "distill":
        assert results["steps_taught"] == num_steps
    else:  # no step waits for the teacher to be read
        assert "its donor is away: from receiver step 1 on heads.h2 learns from nothing" in output
        assert results["steps_taught"] > num_steps / 2


@pytest.mark.slow
def test_a_donor_that_starts_again_beside_a_receiver_that_learns_from_what_it_left(
    recipes: Recipes,
) -> None:
    end(recipes(DONOR, *flags("auto"), "--peer_wait", 2, "--max_train_steps", 12))
    receiver = recipes(RECEIVER, *flags("auto"), "--max_train_steps", 3000)
    wait_until(lambda: "the donor teaches" in receiver.output(), "a teacher")
    claims = recipes.path("0001", "bridge", "donor", "attempts")
    donor = recipes(DONOR, *flags("auto"))
    wait_until(lambda: len(list(claims.iterdir())) == 2, "its second start")
    output = end(receiver)
    assert end(donor).count("TRAINING ALONE") == 0
    assert "its donor is back: heads.h2 takes gradients" in output
    assert [path.name for path in recipes.path().iterdir()] == ["0001"]
    results = check_sums(recipes, "0001", "auto", 3000)
    assert min(results["fates"]["applied"], results["steps_taught"]) > 0


@pytest.mark.slow
@every_exchange
def test_a_donor_that_comes_when_the_receiver_is_already_alone(
    recipes: Recipes, exchange: str
) -> None:
    num_steps = 400
    common = [*flags(exchange), "--run", "late"]
    first = recipes(RECEIVER, *common, "--peer_wait", 4, "--max_train_steps", num_steps)
    wait_until(recipes.path("late", "bridge", "receiver", "heartbeat").exists, "the receiver")
    processes = first.processes()
    wait_until(lambda: "TRAINING ALONE" in first.output(), "going alone")
    for process in processes:  # or it would be done before the donor has started
        process.suspend()
    donor = recipes(DONOR, *common)
    stream = {"distill": "donor.weights", "head": "donor"}.get(exchange)
    there = "donor/heartbeat" if stream is None else f"{stream}/records/*"
    bridge = recipes.path("late", "bridge")
    wait_until(lambda: list(bridge.glob(there)), "the donor")
    for process in processes:
        process.resume()
    output = end(first)
    end(donor)
    results = check_sums(recipes, "late", exchange, num_steps)
    assert output.count("TRAINING ALONE") == 1
    assert 0 < results["steps_alone"] < num_steps
    if exchange == "distill":
        assert "the donor teaches with its weights" in output
        assert results["steps_taught"] > 0
    else:
        assert "the donor joins at receiver step" in output
        assert results["fates"]["applied"] > 0
    if exchange in ("gradient", "delta", "auto"):
        assert results["steps_taught"] == 0
        donated = recipes.results("late", "donor")
        assert donated["windows_alone"] == 0


@pytest.mark.slow
@every_exchange
def test_both_at_once(recipes: Recipes, exchange: str) -> None:
    # Nothing waits for a payload of a head; and two steps more than ten rounds of differences.
    num_steps = {"head": 400, "delta": 42}.get(exchange, 40)
    jobs = [
        recipes(RECEIVER, *flags(exchange), "--max_train_steps", num_steps),
        recipes(DONOR, *flags(exchange)),
    ]
    output, donor_output = map(end, jobs)
    assert [path.name for path in recipes.path().iterdir()] == ["0001"]
    results = check_sums(recipes, "0001", exchange, num_steps)
    assert "TRAINING ALONE" not in output + donor_output
    donated = recipes.results("0001", "donor")
    if exchange == "distill":
        assert results["steps_taught"] == num_steps
    elif exchange == "head":
        assert results["fates"]["applied"] > 0
        assert donated["published"] == donated["windows_alone"] == donated["completed_steps"]
    else:
        assert results["steps_alone"] == num_steps % 40
        assert results["steps_taught"] == donated["windows_alone"] == 0
        assert donated["published"] == donated["completed_steps"]
        assert results["fates"]["dropped"] == results["fates"]["skipped"] == 0


@pytest.mark.slow
@every_exchange
def test_a_donor_that_is_killed_half_way(recipes: Recipes, exchange: str) -> None:
    # No step waits for a payload of a head: the receiver must train on until the silence is long.
    num_steps = 4000 if exchange == "head" else 600
    donor = recipes(DONOR, *flags(exchange))
    receiver = recipes(RECEIVER, *flags(exchange), "--peer_wait", 3, "--max_train_steps", num_steps)
    ledger = recipes.path("0001", "bridge", "receiver", "ledger-0001.jsonl")

    def is_half_way() -> bool:
        if exchange == "distill":
            return "the donor teaches" in receiver.output()
        return ledger.exists() and ledger.read_text().count("applied") >= 10

    wait_until(is_half_way, "the donor is of use")
    donor.kill()
    assert receiver.is_running(), "killed too late"
    output = end(receiver)
    assert not recipes.path("0001", "donor", "results.json").exists()
    results = check_sums(recipes, "0001", exchange, num_steps)
    if exchange == "distill":  # what it has left goes on teaching
        assert results["steps_taught"] == num_steps
        return
    assert output.count("TRAINING ALONE: the donor fell silent for 3 s") == 1
    assert 10 <= results["fates"]["applied"] < num_steps
    if exchange == "auto":
        assert "on heads.h2 learns from a teacher" in output
        assert results["steps_taught"] > 0
        assert results["steps_alone"] == 1, "the step that waited"
    else:
        assert results["steps_alone"] > 0
