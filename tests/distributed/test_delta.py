"""Local steps on the donor, outer steps on the receiver: launched jobs equal one process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.distributed.test_oracle import Trained, World, train
from tests.oracle import Case, largest_difference, train_with_deltas

CASES = [
    Case(exchange="delta", num_steps=24),
    Case(exchange="delta", num_steps=24, optimizer="momentum", outer_momentum=0.5),
    Case(exchange="delta", num_steps=24, local_steps=1, optimizer="sgd", max_grad_norm=0.05),
    Case(exchange="delta", num_steps=24, accumulation=2, donor_accumulation=3),
    Case(exchange="delta", num_steps=24, prepared=False),
]


@pytest.fixture(
    scope="module",
    params=[World(2, 2), pytest.param(World(1, 1), marks=pytest.mark.slow)],
    ids="{0[0]}x{0[1]}".format,
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Every case in this world."""
    return train(tmp_path_factory.mktemp("delta"), request.param, CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_that_rounds_equal_those_of_one_process(trained: Trained, case: Case) -> None:
    world, weights = trained.world, trained.weights(case)
    expected = train_with_deltas(case, world.receiver, world.donor)
    assert largest_difference(weights, expected) <= 1e-12
    for rank in range(1, world.receiver):
        assert largest_difference(weights, trained.weights(case, rank)) == 0.0
    other = dataclasses.replace(case, donor_weight=0.69)
    wrong = train_with_deltas(other, world.receiver, world.donor)
    assert largest_difference(wrong, expected) > 1e-6, "this case sees no wrong factor"


def test_that_every_round_takes_one_difference(trained: Trained) -> None:
    for case in CASES:
        run = Path(trained.directory, case.name, "runs", "0001")
        (trail,) = (run / "bridge" / "receiver").glob("ledger-*.jsonl")
        entries = [json.loads(line) for line in trail.read_text().splitlines()]
        rounds = [case.local_steps * (1 + i) for i in range(case.num_steps // case.local_steps)]
        assert [entry["receiver_step"] for entry in entries] == rounds
        assert {entry["fate"] for entry in entries} == {"applied"}
