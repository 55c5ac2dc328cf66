"""The core of the matrix: its cases of two ranks on both sides, for a few steps in one launch.

``tests/matrix`` has the rest, and the faults that must be seen (``pytest -m matrix -n0``).
"""

from __future__ import annotations

import dataclasses

import pytest

from tests import IS_OLD_FSDP2
from tests.matrix.cases import DIMENSIONS, missing_pairs, read_rows, setting_of
from tests.matrix.running import Run, compare, launch, resting
from tests.matrix.setting import Setting

ROWS = read_rows()


def shortened(number: int) -> Setting:
    """Without compiling, which takes longer than the rest."""
    row = {name: "plain" if value == "compiled" else value for name, value in ROWS[number].items()}
    return dataclasses.replace(setting_of(row, number), num_steps=10)


TWO_BY_TWO = [
    number
    for number, row in enumerate(ROWS)
    if row["receiver.ranks"] == row["donor.ranks"] == 2
    and not (IS_OLD_FSDP2 and row["clip"] and "fsdp2" in row.values())
]
CORE = {f"case {number:02d}": shortened(number) for number in TWO_BY_TWO[:5]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    directory = tmp_path_factory.mktemp("core")
    runs = {name: Run(setting, directory / name) for name, setting in CORE.items()}
    launch(directory, list(runs.values()), timeout=240)
    return runs


@pytest.mark.parametrize("name", CORE)
def test_that_a_case_equals_joint_training(trained: dict[str, Run], name: str) -> None:
    outcome = compare(trained[name])
    assert not resting(trained[name]), "a parameter did not train: equality would say nothing"
    assert outcome.is_accepted, (outcome, CORE[name])


def test_that_every_two_values_that_can_meet_do() -> None:
    assert not missing_pairs(ROWS)
    for dtype in ("float64", "float32"):
        rows = [row for row in ROWS if row["dtype"] == dtype]
        assert not missing_pairs(rows, DIMENSIONS | {"dtype": [dtype]})
