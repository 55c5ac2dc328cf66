"""Isolation under DistributedDataParallel, on two ranks that really run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.jobs.every_case import launch_all
from tests.jobs.isolation_job import CASES, Case, build, reference

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Weights]]:
    """By case, the weights of both ranks."""
    directory = tmp_path_factory.mktemp("isolation")
    return launch_all("tests/jobs/isolation_job.py", directory, CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_equal_one_process(trained: dict[str, list[Weights]], case: Case) -> None:
    first, second = trained[case.name]
    assert all(torch.equal(first[name], second[name]) for name in first)
    expected = reference(case)
    assert set(first) == set(expected)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-12)
    for name, model in zip(("critic", "generator"), build(), strict=True):
        moved = {k: (first[f"{name}.{k}"] - v).abs().max() for k, v in model.state_dict().items()}
        assert min(moved["0.weight"], moved["2.weight"]) > 0.01
