"""Two launched jobs equal joint training in one process; wrong factors do not.

One launch of a donor and a receiver trains every case of a list, because starting the processes
takes longer than training them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.launching import Launcher
from tests.oracle import Case, build_network, largest_difference, train_jointly

JOB = "tests/jobs/bridge_job.py"
TIMEOUT = 240.0  # seconds, for a hang only

EVERY_WORLD = [
    Case(optimizer="sgd"),
    Case(optimizer="momentum"),
    Case(),
    Case(rescale="append", num_steps=20),
    Case(rescale="pool", num_steps=20),
    Case(loss_reduction="sum", num_steps=20),
    Case(rescale="append", loss_reduction="sum", num_steps=20),
    Case(scope="head", num_steps=20),
    Case(aggregate="pcgrad", accumulation=3, num_steps=20),
    Case(aggregate="mgda", donor_accumulation=3, rescale="append", num_steps=20),
    Case(accumulation=3, num_steps=20),
    Case(donor_accumulation=3, num_steps=20),
    Case(accumulation=3, donor_accumulation=3, rescale="pool", optimizer="momentum", num_steps=20),
    Case(accumulation=3, donor_accumulation=3, loss_reduction="sum", scope="head", num_steps=20),
    Case(max_grad_norm=0.05, optimizer="sgd", rescale="append", num_steps=20),
    Case(compression="topk", donor_accumulation=3, num_steps=15),
    Case(compression="topk", rescale="append", optimizer="sgd", num_steps=15),
    Case(compression="bf16", accumulation=3, num_steps=10),
    Case(prepared=False, accumulation=3, num_steps=20),
    Case(dtype="float32", num_steps=20),
    Case(dtype="float32", optimizer="sgd", accumulation=3, num_steps=20),
]
# Every one of these, in a world of two ranks and three micro-steps on both sides, is wrong; see
# `tests/matrix/mutations.py`.
MUTATIONS = [
    Case(mutation=mutation, accumulation=3, donor_accumulation=3, optimizer="sgd", num_steps=10)
    for mutation in (
        "payload halved",
        "payload times world size",
        "payload twice",
        "payload on one rank",
        "payload without one tensor",
        "stale by one",
        "accumulation forgotten, receiver",
        "world size forgotten, donor",
        "mean for sum",
        "mean of means, donor",
    )
]
MUTATIONS.append(dataclasses.replace(MUTATIONS[0], mutation="other weights", aggregate="pcgrad"))


class World(NamedTuple):
    """Ranks of the receiver and of the donor."""

    receiver: int
    donor: int


class Trained(NamedTuple):
    """Where a world's cases left their weights."""

    world: World
    directory: Path

    def weights(self, case: Case, rank: int = 0) -> dict[str, Tensor]:
        """The receiver's final weights."""
        return load_file(self.directory / case.name / f"receiver-{rank}.safetensors")


def train(directory: Path, world: World, cases: list[Case]) -> Trained:
    """Train all cases with one launch of each job."""
    directory.mkdir(parents=True, exist_ok=True)
    listing = directory / "cases.json"
    listing.write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
    with Launcher(directory) as launch:
        jobs = [
            launch(JOB, role, listing, directory, "--expect_processes", ranks, num_processes=ranks)
            for role, ranks in (("donor", world.donor), ("receiver", world.receiver))
        ]
        for job in reversed(jobs):
            job.wait(TIMEOUT)
    return Trained(world, directory)


def check_trained_jointly(trained: Trained, case: Case) -> None:
    """The oracle check: every parameter and every rank of the receiver."""
    world, weights = trained.world, trained.weights(case)
    joint = train_jointly(case, world.receiver, world.donor)
    if case.dtype == "float64":
        bound = 1e-12
    else:
        split = train_jointly(case, world.receiver, world.donor, splits=2)
        bound = 10 * largest_difference(split, joint)
    assert largest_difference(weights, joint) <= bound
    for rank in range(1, world.receiver):
        assert largest_difference(weights, trained.weights(case, rank)) == 0.0


@pytest.fixture(
    scope="module",
    params=[World(2, 2), pytest.param(World(1, 1), marks=pytest.mark.slow)],
    ids="{0[0]}x{0[1]}".format,
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Every case in this world."""
    return train(tmp_path_factory.mktemp("oracle"), request.param, EVERY_WORLD)


@pytest.mark.parametrize("case", EVERY_WORLD, ids=lambda case: case.name)
def test_bridge_equals_joint_training(trained: Trained, case: Case) -> None:
    weights = trained.weights(case)
    start = build_network(case).state_dict()
    moved = {
        name
        for name in weights
        if largest_difference({name: weights[name]}, {name: start[name]}) > 1e-3
    }
    assert moved == set(weights), "a parameter did not train: equality would say nothing"
    check_trained_jointly(trained, case)


def test_that_compression_changes_these_cases() -> None:
    for case in EVERY_WORLD:
        if case.compression != "none":
            plain = train_jointly(dataclasses.replace(case, compression="none"))
            assert largest_difference(train_jointly(case), plain) > 1e-4, case.name


def test_that_the_gradients_of_these_cases_conflict() -> None:
    for case in EVERY_WORLD:
        if case.aggregate != "sum":
            summed = train_jointly(dataclasses.replace(case, aggregate="sum"))
            assert largest_difference(train_jointly(case), summed) > 1e-3, case.name


@pytest.mark.slow  # the core of the matrix has unlike worlds too
@pytest.mark.parametrize("world", [World(2, 1), World(1, 2)], ids=str)
def test_unlike_worlds(tmp_path: Path, world: World) -> None:
    cases = [Case(accumulation=3), Case(donor_accumulation=3, rescale="pool", optimizer="sgd")]
    trained = train(tmp_path, world, cases)
    for case in cases:
        check_trained_jointly(trained, case)


@pytest.mark.slow
def test_a_receiver_runs_ahead_of_a_slow_donor_by_the_allowed_steps_only(tmp_path: Path) -> None:
    case = Case(max_staleness=2, donor_pause=0.1, num_steps=30)
    trained = train(tmp_path, World(2, 1), [case])
    ledger = tmp_path / case.name / "runs" / "0001" / "bridge" / "receiver" / "ledger-0001.jsonl"
    entries = [json.loads(line) for line in ledger.read_text().splitlines()]
    applied = [entry["receiver_step"] for entry in entries if entry["fate"] == "applied"]
    assert [entry["fate"] for entry in entries] == ["applied"] * len(applied)
    gaps = [later - earlier for earlier, later in itertools.pairwise(applied)]
    assert 1 <= min(gaps) <= max(gaps) <= 3
    assert len(applied) < 30, "the donor was not slower: this test says nothing"
    weights = trained.weights(case)
    assert largest_difference(weights, trained.weights(case, rank=1)) == 0.0


@pytest.mark.slow  # the campaign of faults does more of it
def test_bad_files_are_rejected_and_training_goes_on(tmp_path: Path) -> None:
    case = Case(mutation="bad files", num_steps=20)
    trained = train(tmp_path, World(2, 2), [case])
    # The torn payload costs its window. The alien costs none, unless the receiver moves it aside
    # in the very moment in which the donor publishes: then that payload counts as refused too.
    weights, differences = trained.weights(case), []
    for lost in ({5}, {5, 9}):
        joint = train_jointly(case, 2, 2, lost_windows=frozenset(lost))
        differences.append(largest_difference(weights, joint))
    assert min(differences) <= 1e-12, differences
    assert largest_difference(weights, trained.weights(case, rank=1)) == 0.0
    run = tmp_path / case.name / "runs" / "0001"
    fates = json.loads((run / "fates.json").read_bytes())
    assert fates == {
        "applied": 20, "dropped": 0, "rejected": 2, "skipped": 0, "pending": 0,
        "published": 22, "alien": 1,
    }  # fmt: skip
    notes = sorted((run / "bridge" / "donor" / "rejected").glob("*.json"))
    assert [int(note.stem) for note in notes] == [5, 9]
    reasons = [json.loads(note.read_bytes())["reason"] for note in notes]
    assert reasons == ["truncated", "malformed"]


@pytest.fixture(scope="module")
def mutated(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Every deliberate fault, and the same case without one."""
    sound = dataclasses.replace(MUTATIONS[0], mutation="")
    return train(tmp_path_factory.mktemp("mutations"), World(2, 2), [sound, *MUTATIONS])


def test_the_case_that_is_mutated_is_sound(mutated: Trained) -> None:
    check_trained_jointly(mutated, dataclasses.replace(MUTATIONS[0], mutation=""))


@pytest.mark.parametrize("case", MUTATIONS, ids=lambda case: case.mutation)
def test_wrong_factors_are_rejected(mutated: Trained, case: Case) -> None:
    with pytest.raises(AssertionError):
        check_trained_jointly(mutated, case)
    joint = train_jointly(case, *mutated.world)
    assert largest_difference(mutated.weights(case), joint) > 1e-6, "wrong by rounding only"
