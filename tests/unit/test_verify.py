"""What a verification finds between two sets of weights, and between two environments."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from toolkit.bridge.errors import BridgeError
from toolkit.finished_run import find_run
from toolkit.verify import Verification, compare, environment_warnings

WEIGHTS = {"a": torch.tensor([1.0, -2.0]), "b": torch.zeros(2, 3), "n": torch.tensor([math.nan])}


def build(differences: dict[str, float | None]) -> Verification:
    return Verification(
        run="r", steps=1, payloads_applied=1, steps_alone=0, differences=differences,
        departed_at=None, device="cpu", seconds=1.0, warnings=[],
    )  # fmt: skip


def test_that_equal_bits_differ_nowhere() -> None:
    assert compare(WEIGHTS, {name: tensor.clone() for name, tensor in WEIGHTS.items()}) == {}
    assert build({}).bitwise_equal
    assert build({}).largest_difference == 0.0


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (torch.tensor([1.0, -2.5]), 0.5),
        (torch.tensor([1.0, -2.0]).double(), 0.0),
        (torch.tensor([1.0, math.inf]), None),
        (torch.tensor([1.0]), None),
        (None, None),
    ],
)
def test_that_each_difference_is_named_with_its_size(
    other: torch.Tensor | None, difference: float | None
) -> None:
    found = {**WEIGHTS, "a": other}
    present = {name: tensor for name, tensor in found.items() if tensor is not None}

    assert compare(WEIGHTS, present) == {"a": difference}
    assert compare(present, WEIGHTS) == {"a": difference}
    assert not build({"a": difference}).bitwise_equal
    assert build({"a": difference, "b": 0.25}).largest_difference == (
        None if difference is None else max(difference, 0.25)
    )


def test_that_zeros_of_unlike_sign_are_not_the_same_bits() -> None:
    assert compare({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])}) == {"a": 0.0}


def test_that_another_version_is_a_warning_and_another_directory_is_none() -> None:
    run = {"torch": "2.12.0", "device": "cpu", "working_directory": "/here"}
    replay = {"torch": "2.13.0", "device": "cpu", "working_directory": "/there"}

    assert environment_warnings(run, replay) == [
        "torch: the run had 2.12.0, the replay has 2.13.0; bits may differ"
    ]
    assert len(environment_warnings({**run, "more": 1}, replay)) == 2


def test_that_a_run_is_found_by_its_path_or_its_name(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "0003"
    (run / "bridge").mkdir(parents=True)
    with pytest.raises(BridgeError, match=r"no run '0003': looked for 0003 and .*runs/0003"):
        find_run("0003", tmp_path / "runs")
    (run / "bridge" / "run.json").write_text("{}")

    assert find_run("0003", tmp_path / "runs") == run
    assert find_run(str(run), Path("elsewhere")) == run
