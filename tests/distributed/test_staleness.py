"""Donors of different ages and heads under a loss scale, on one rank and two, whole and sharded."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from tests.jobs.several_donors_job import Network, build_optimizer
from tests.jobs.staleness_job import (
    COMPENSATION,
    DONOR_WEIGHT,
    OWN_COUNT,
    RULES,
    STEPS,
    own_sum,
    payload,
    train,
)
from tests.launching import Launcher
from tests.oracle import largest_difference
from tests.unit.jobs import reset

TIMEOUT = 120.0  # seconds, for a hang only


def train_by_hand(rule: str) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """One process: the final weights, and by donor of each step how far the weights had moved."""
    model = Network(["h1", "h2", "h3"])
    optimizer = build_optimizer(model)
    parameters = dict(model.named_parameters())
    versions: list[dict[str, Tensor]] = []
    moved: list[dict[str, float]] = []
    for step, donors in enumerate(STEPS):
        versions.append({name: p.detach().clone() for name, p in parameters.items()})
        grads = {name: s / OWN_COUNT for name, s in own_sum(parameters, step).items()}
        counts: dict[str, float] = defaultdict(float)
        for head, _, count in donors.values():
            counts[head] += count
        moved.append({})
        for donor, (head, age, count) in donors.items():
            squares = 0.0
            for name, total in payload(parameters, step, donor).items():
                change = versions[step][name] - versions[step - age][name]
                squares += float(change.square().sum())
                mean = total / count
                if rule == "damp":
                    mean = mean / (1 + age)
                if rule == "compensate":
                    mean = mean + COMPENSATION * mean**2 * change
                if rule == "compensate_adaptive":
                    mean = mean + COMPENSATION * mean.abs() * change
                part = DONOR_WEIGHT[head] * mean * count / counts[head]
                grads[name] = grads.get(name, torch.zeros_like(part)) + part
            moved[-1][donor] = math.sqrt(squares)
        for name, parameter in parameters.items():
            parameter.grad = grads.get(name)
        optimizer.step()
    return {name: p.detach().clone() for name, p in parameters.items()}, moved


def check(rule: str, weights: dict[str, Tensor], metrics: list[dict[str, float]]) -> None:
    """Compare weights and metrics with one process."""
    expected, moved = train_by_hand(rule)
    assert largest_difference(weights, expected) <= 1e-12
    for step, donors in enumerate(STEPS):
        for donor, (_, age, _) in donors.items():
            tag = f"bridge/staleness {donor}"
            assert metrics[step][f"{tag} (receiver steps)"] == age
            found = metrics[step][f"{tag} (norm of weight change)"]
            assert found == pytest.approx(moved[step][donor], rel=1e-9)


def test_that_the_rules_differ() -> None:
    for first, second in itertools.combinations(RULES, 2):
        assert largest_difference(train_by_hand(first)[0], train_by_hand(second)[0]) > 1e-4


@pytest.fixture
def accelerator(tmp_path: Path) -> Iterator[Accelerator]:
    """One rank, in this process, on which FSDP2 can shard."""
    reset()
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield Accelerator(cpu=True)
    dist.destroy_process_group()
    reset()


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_one_rank_equals_the_formulas(accelerator: Accelerator, rule: str, shards: bool) -> None:
    check(rule, *train(accelerator, rule, shards))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks wrote."""
    directory = tmp_path_factory.mktemp("staleness")
    with Launcher(directory) as launch:
        launch("tests/jobs/staleness_job.py", directory, num_processes=2).wait(TIMEOUT)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["whole", "sharded"])
@pytest.mark.parametrize("rule", RULES)
def test_two_ranks_equal_the_formulas(output: Path, rule: str, layout: str) -> None:
    ranks = [load_file(output / f"{rule}-{layout}-{rank}.safetensors") for rank in (0, 1)]
    assert largest_difference(*ranks) == 0.0
    for rank in (0, 1):
        metrics = json.loads((output / f"{rule}-{layout}-{rank}.json").read_text())
        check(rule, ranks[rank], metrics)
