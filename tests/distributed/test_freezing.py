"""Freezing on two ranks that really run, under DistributedDataParallel and FSDP2."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import IS_OLD_FSDP2
from tests.jobs.freezing_refusals import REFUSALS
from tests.jobs.freezing_training import CASES, NAIVE_CASES, NUM_RANKS
from tests.launching import Launcher

Report = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    """Both ranks' reports."""
    directory = tmp_path_factory.mktemp("freezing")
    with Launcher(directory) as launcher:
        launcher("tests/jobs/freezing_job.py", directory, num_processes=NUM_RANKS).wait(200)
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_truth_table(reports: list[Report], name: str) -> None:
    for report in reports:
        assert report["outcomes"][name] == {
            "resting": [],
            "others": [],
            "changed": ["hidden_task1.weight", "output.weight"],
            "num_ranks": NUM_RANKS,
            "ranks_equal": True,
        }


def test_naive_ways_move_the_layer(reports: list[Report]) -> None:
    requires_grad, one_rank = (reports[0]["outcomes"][name] for name in NAIVE_CASES)
    assert "parameter hidden_task2.0.weight" in requires_grad["resting"]
    assert not one_rank["ranks_equal"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unused-default", ["has not averaged", "hidden_task2.0.weight", "find_unused_parameters"]),
        ("unused-static-graph", ["has not averaged", "hidden_task2.0.weight"]),
        ("unused-bucket-view", ["has not averaged", "hidden_task2.0.weight"]),
        ("sets-differ", ["rank 0: freeze hidden_task1", "rank 1: freeze hidden_task2"]),
        ("unfrozen-on-one-rank", ["rank 0: unfreeze hidden_task1", "rank 1: unfreeze"]),
        ("saving-compute-default", ["requires_grad=False is not safe", "find_unused_parameters"]),
        ("saving-compute-static-graph", ["requires_grad=False is not safe", "static_graph"]),
        ("saving-compute-fsdp2", ["requires_grad=False is not safe", "FSDP2"]),
    ],
)
def test_refused_on_both_ranks(reports: list[Report], name: str, words: list[str]) -> None:
    if IS_OLD_FSDP2 and "fsdp2" in name:
        pytest.skip("FSDP2 of this torch does not run on the CPU")
    for report in reports:
        assert all(word in report["refusals"][name] for word in words), report["refusals"][name]


def test_an_error_on_one_rank_is_told_on_the_other(reports: list[Report]) -> None:
    own, other = (report["refusals"]["unknown-on-one-rank"] for report in reports)
    assert own.startswith("'hidden_task3' is no parameter and no module of the model")
    assert "rank 0: error: 'hidden_task3' is no parameter" in other
    assert set(REFUSALS) == set(reports[0]["refusals"])
