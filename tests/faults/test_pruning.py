"""What a donor deletes while its receiver is blocked: nothing unread; and what it keeps at most."""

from __future__ import annotations

import os

import pytest

from tests.faults.running import FaultyRecipes, await_output
from tests.faults.test_processes import stopped
from tests.launching import Job
from tests.recipes.running import TIMEOUT, wait_until

pytestmark = pytest.mark.faults

BUDGET, NUM_WHILE_BLOCKED = 600, 100


def numbers(recipes: FaultyRecipes) -> list[int]:
    """Of the payloads that are there."""
    names = os.listdir(recipes.path("0001", "bridge", "donor", "records"))
    return sorted(int(name[:10]) for name in names if name[:10].isdigit())


def start(recipes: FaultyRecipes, budget: int) -> tuple[Job, Job]:
    """A donor that waits for nobody and a receiver, after its first steps."""
    receiver = recipes.start("receiver", "--exchange", "head", "--max_train_steps", 1000)
    wait_until(recipes.path("0001", "bridge", "receiver", "heartbeat").exists, "the receiver")
    donor = recipes.start(
        "donor",
        *("--exchange", "head", "--publish_every", 1, "--payload_budget_files", budget),
        *("--max_train_steps", 500),
    )
    wait_until(lambda: num_settled(recipes) > 5, "the first steps")
    return donor, receiver


def num_settled(recipes: FaultyRecipes) -> int:
    """How many payloads have a fate."""
    trail = recipes.path("0001", "bridge", "receiver", "ledger-0001.jsonl")
    return trail.read_text().count("\n") if trail.exists() else 0


def test_nothing_unread_is_deleted_while_the_receiver_is_blocked(recipes: FaultyRecipes) -> None:
    donor, receiver = start(recipes, BUDGET)
    with stopped(receiver):
        there = numbers(recipes)
        wait_until(lambda: numbers(recipes)[-1] >= there[-1] + NUM_WHILE_BLOCKED, "100 payloads")
        with stopped(donor):
            now = numbers(recipes)
            assert now == list(range(now[0], now[-1] + 1))
            assert now[0] <= num_settled(recipes), "an unread payload is gone"
            assert len(now) <= BUDGET + 1
    donor.wait(TIMEOUT)
    receiver.wait(TIMEOUT)
    fates = recipes.check_ledger()
    assert fates["applied"] == fates["published"] > NUM_WHILE_BLOCKED


def test_a_receiver_that_is_blocked_for_too_long_costs_the_donor_and_not_the_disk(
    recipes: FaultyRecipes,
) -> None:
    donor, receiver = start(recipes, 60)
    with stopped(receiver):
        assert donor.wait(TIMEOUT, check=False) == 1
        await_output(donor, "the budget is 60 (--payload_budget_files)")
        assert len(numbers(recipes)) == 61
    receiver.wait(TIMEOUT)
    fates = recipes.check_ledger()
    assert fates["applied"] == fates["published"]
