"""Jobs whose model FSDP2 has sharded over two ranks equal joint training; wrong gathering does not.

Through Accelerate, which does it on GPUs only and is made to on the CPU here, and by hand
(``prepared=False``), with some parameters that stay whole; see ``tests/jobs/sharding.py``.
"""

from __future__ import annotations

import dataclasses

import pytest

from tests import IS_OLD_FSDP2
from tests.distributed.test_oracle import Trained, World, check_trained_jointly, train
from tests.oracle import Case, largest_difference, train_jointly

WORLD = World(2, 2)
CASES = [
    dataclasses.replace(case, num_steps=12)
    for case in (
        Case(sharded="both", accumulation=3, donor_accumulation=3, max_grad_norm=0.05),
        Case(sharded="both", accumulation=3, scope="head", loss_reduction="sum"),
        Case(sharded="both", compression="topk", donor_accumulation=3),
        Case(sharded="both", aggregate="pcgrad", accumulation=3),
        Case(sharded="donor", donor_accumulation=3, rescale="pool"),
        Case(sharded="receiver", max_grad_norm=0.05, rescale="append", optimizer="momentum"),
        Case(sharded="both", prepared=False, accumulation=3, donor_accumulation=3),
        Case(sharded="receiver", prepared=False, aggregate="pcgrad", optimizer="sgd"),
        Case(sharded="receiver", mutation="torn_weights"),  # which are published once more
    )
    if not (IS_OLD_FSDP2 and case.max_grad_norm)
]
SOUND = Case(
    sharded="both", accumulation=3, donor_accumulation=3, optimizer="sgd", num_steps=4
)  # fmt: skip
MUTATIONS = [
    dataclasses.replace(SOUND, mutation=mutation)
    for mutation in (
        "donor_gathers_one_shard",
        "receiver_gathers_one_shard",
        "reduce_twice",
        "shard_of_another_rank",
        "stale_copies",
    )
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Every case, sound and faulty, with one launch of each job."""
    return train(tmp_path_factory.mktemp("sharded"), WORLD, [*CASES, SOUND, *MUTATIONS])


@pytest.mark.parametrize("case", [*CASES, SOUND], ids=lambda case: case.name)
def test_sharded_jobs_equal_joint_training(trained: Trained, case: Case) -> None:
    check_trained_jointly(trained, case)
    if case.aggregate != "sum":
        summed = train_jointly(dataclasses.replace(case, aggregate="sum"), *WORLD)
        assert largest_difference(trained.weights(case), summed) > 1e-4, "no gradients conflicted"


@pytest.mark.parametrize("case", MUTATIONS, ids=lambda case: case.mutation)
def test_wrong_gathering_is_rejected(trained: Trained, case: Case) -> None:
    with pytest.raises(AssertionError):
        check_trained_jointly(trained, case)
    difference = largest_difference(trained.weights(case), train_jointly(case, *WORLD))
    assert difference > 1e-6, "wrong by rounding only"
