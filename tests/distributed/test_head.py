"""Gradients of the donor's own head: each is applied once, rescaled, and B is left alone."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.distributed.test_oracle import Trained, World, train
from tests.oracle import Case, build_network, largest_difference, train_with_head

pytestmark = pytest.mark.slow

CASES = [
    Case(exchange="head", num_steps=60, optimizer="momentum"),
    Case(exchange="head", num_steps=60, init_h2="donor", optimizer="sgd"),
]
WORLD = World(2, 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("head"), WORLD, CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_that_each_gradient_is_applied_once_and_rescaled(trained: Trained, case: Case) -> None:
    run = trained.directory / case.name / "runs" / "0001"
    (trail,) = (run / "bridge" / "receiver").glob("ledger-*.jsonl")
    entries = [json.loads(line) for line in trail.read_text().splitlines()]
    assert {entry["fate"] for entry in entries} == {"applied"}
    assert [entry["sequence"] for entry in entries] == list(range(len(entries)))
    assert len(entries) > 5, "hardly a payload came: this test says nothing"
    by_step = {entry["receiver_step"]: entry["sequence"] for entry in entries}
    assert len(by_step) == len(entries), "two payloads in one step"
    payloads = [by_step.get(step) for step in range(case.num_steps)]

    weights = trained.weights(case)
    expected = train_with_head(case, *WORLD, payloads)
    assert largest_difference(weights, expected) <= 1e-12
    assert largest_difference(weights, trained.weights(case, rank=1)) == 0.0
    other = train_with_head(dataclasses.replace(case, donor_weight=0.69), *WORLD, payloads)
    assert largest_difference(other, expected) > 1e-6


def test_that_the_backbone_is_what_it_is_alone(trained: Trained) -> None:
    for case in CASES:
        alone = train_with_head(case, *WORLD, [None] * case.num_steps)
        weights = trained.weights(case)
        for name in build_network(case, ("h1",)).state_dict():
            assert largest_difference({name: weights[name]}, {name: alone[name]}) <= 1e-12
