"""Isolation under DistributedDataParallel, on two ranks that really run."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.jobs.isolation_job import CASES, Case, build, reference
from tests.launching import Launcher

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Weights]]:
    """By case, the weights of both ranks."""
    directory = tmp_path_factory.mktemp("isolation")
    with Launcher(directory) as launcher:
        launcher("tests/jobs/isolation_job.py", directory, num_processes=2).wait(200)
    return {
        case.name: [load_file(directory / f"{case.name}-{rank}.safetensors") for rank in (0, 1)]
        for case in CASES
    }


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
