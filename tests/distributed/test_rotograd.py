"""RotoGrad under DistributedDataParallel, on two ranks that really run."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.jobs.rotograd_job import CASES, Case, new_model, reference
from tests.launching import Launcher

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[State]]:
    """By case, the final states of both ranks."""
    directory = tmp_path_factory.mktemp("rotograd")
    with Launcher(directory) as launcher:
        launcher("tests/jobs/rotograd_job.py", directory, num_processes=2).wait(200)
    return {
        case.name: [load_file(directory / f"{case.name}-{rank}.safetensors") for rank in (0, 1)]
        for case in CASES
    }


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
