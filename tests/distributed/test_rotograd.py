"""RotoGrad under DistributedDataParallel, on two ranks that really run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.jobs.every_case import launch_all
from tests.jobs.rotograd_job import CASES, Case, new_model, reference

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[State]]:
    """By case, the final states of both ranks."""
    directory = tmp_path_factory.mktemp("rotograd")
    return launch_all("tests/jobs/rotograd_job.py", directory, CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_equal_one_process(trained: dict[str, list[State]], case: Case) -> None:
    first, second = trained[case.name]
    assert all(torch.equal(first[k].nan_to_num(-1), second[k].nan_to_num(-1)) for k in first)
    expected = reference(case)
    assert set(first) == set(expected)
    if case.precision == "bf16":  # first norms are larger than the weights
        assert first.pop("_extra_state")[1] == expected.pop("_extra_state")[1]
    torch.testing.assert_close(first, expected, rtol=0, atol=case.tolerance, equal_nan=True)
    start = new_model(case).state_dict()
    for name in ("backbone.0.weight", "heads.1.0.weight", "rotations.matrices"):
        assert (first[name] - start[name]).abs().max() > 10 * case.tolerance, name
    assert not first["rotations.tangents"].any()
