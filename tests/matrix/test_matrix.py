"""The whole matrix, with ``pytest -m matrix -n0``: every case exact, every fault seen.

One launch of both jobs trains all cases with the same numbers of ranks, each as it is and, for a
few steps, with every mutation that has an effect there. What was measured is left in
``build/matrix``, from which ``python -m tests.matrix.report`` makes ``tests/MATRIX.md``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from tests.matrix.cases import DISTANCES, EXTRA, read_rows, setting_of
from tests.matrix.joint import train_jointly
from tests.matrix.mutations import mutations_of
from tests.matrix.overflow import OVERFLOWS
from tests.matrix.records import record
from tests.matrix.running import (
    EXACT,
    Run,
    compare,
    launch,
    precision_of,
    resting,
    runs_of,
)
from tests.matrix.setting import build_network, to_json
from tests.oracle import largest_difference

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1800)]

SETTINGS = [setting_of(row, seed) for seed, row in enumerate(read_rows())]
CASES = {f"case {number:02d}": setting for number, setting in enumerate(SETTINGS)}
CASES |= EXTRA | OVERFLOWS
ALL = CASES | DISTANCES
MUTATED = [name for name, s in CASES.items() if s.dtype == "float64" and mutations_of(s)]


def each(names: Iterable[str]) -> pytest.MarkDecorator:
    """One test a case, those with the same numbers of ranks after one another (``-k 2x3``)."""
    ordered = sorted(names, key=lambda name: ALL[name].worlds)
    return pytest.mark.parametrize(
        ("trained", "name"),
        [(ALL[name].worlds, name) for name in ordered],
        indirect=["trained"],
        ids=["{}x{}-".format(*ALL[name].worlds) + name.replace(" ", "-") for name in ordered],
        scope="module",
    )


@pytest.fixture(scope="module")
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Run]]:
    """The runs of every case with these numbers of ranks, the one without a mutation first."""
    directory = tmp_path_factory.mktemp("x".join(map(str, request.param)))
    selected = {
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.get_closest_marker("matrix")
    }
    runs = {
        name: runs_of(f"{number:03d}", setting, directory, is_mutated=name in MUTATED)
        for number, (name, setting) in enumerate(ALL.items())
        if setting.worlds == request.param and name in selected
    }
    launch(directory, [run for case in runs.values() for run in case], timeout=1700)
    return runs


@each(CASES)
def test_that_a_case_equals_joint_training(trained: dict[str, list[Run]], name: str) -> None:
    run = trained[name][0]
    outcome = compare(run)
    record(
        name,
        setting=to_json(run.setting),
        precision=precision_of(run.setting),
        **dataclasses.asdict(outcome),
    )
    assert not resting(run), "a parameter did not train: equality would say nothing"
    assert outcome.is_accepted, (outcome, run.setting)


@each(MUTATED)
def test_that_every_fault_is_seen(trained: dict[str, list[Run]], name: str) -> None:
    sound, *mutated = trained[name]
    assert [run.mutation for run in mutated] == mutations_of(sound.setting)
    outcomes = {run.mutation: compare(run) for run in mutated}
    record(name, mutations={mutation: not o.is_accepted for mutation, o in outcomes.items()})
    missed = {mutation: o for mutation, o in outcomes.items() if o.is_accepted}
    assert not missed, (missed, sound.setting)


@each(DISTANCES)
def test_how_far_off_it_is_where_it_cannot_be_equal(
    trained: dict[str, list[Run]], name: str
) -> None:
    (run,) = trained[name]
    setting, weights, pairs = run.setting, run.weights(), run.pairs()
    joint = train_jointly(setting, pairs)
    trainable = {name for name, _ in build_network(setting).named_parameters()}

    def distance(other: dict[str, Tensor], is_parameter: bool = True) -> float:
        names = [name for name in weights if (name in trainable) == is_parameter]
        if not names:
            return 0.0
        pick = [{name: tensors[name] for name in names} for tensors in (weights, other)]
        return largest_difference(*pick)

    measured = {
        "parameters": distance(joint),
        "statistics": distance(joint, is_parameter=False),
        "moved": distance(dict(build_network(setting).state_dict())),
        "other_seed": largest_difference(joint, train_jointly(setting, pairs, stream_seed=1)),
    }
    record(name, **measured)
    assert measured["parameters"] < measured["moved"], measured
    for rank in range(1, setting.receiver.ranks):
        others = run.weights(rank)
        assert all(torch.equal(weights[name], others[name]) for name in trainable)
    if name == "BatchNorm, one rank each":  # the parameters are, the statistics are not
        assert measured["parameters"] <= EXACT < measured["statistics"], measured
