"""``recipes/benchmark.py exchanges`` without a launch: its figures, its flags, its late donor."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from recipes.donor import parse_arguments as parse_donor
from recipes.joint import parse_arguments as parse_joint
from recipes.receiver import parse_arguments as parse_receiver
from toolkit.benchmarks.exchanges.late_donor import LatePublisher
from toolkit.benchmarks.exchanges.plot import plot
from toolkit.benchmarks.exchanges.rows import ROWS, Row, commands
from toolkit.benchmarks.exchanges.summary import Summary, notes, summarize
from toolkit.benchmarks.exchanges.trials import Outcome
from toolkit.bridge.payload import Header, Kind, parse_record
from toolkit.bridge.transport import DirectoryTransport

PARSERS = {"donor": parse_donor, "receiver": parse_receiver, "joint": parse_joint}


def outcome(row: str, seed: int, h1: float, h2: float, seconds: float = 1.0) -> Outcome:
    return Outcome(
        row=row, seed=seed, accuracies={"h1": h1, "h2": h2}, payloads=10, mib=2.0, donor_mib=1.0,
        mean_staleness=None, training_seconds=seconds,
    )  # fmt: skip


def summaries_of_two_seeds() -> dict[str, Summary]:
    """h2: alone 10, joint 90, delta 74; h1: joint 0.5 above alone. Joint is left out of bytes."""
    outcomes = [
        outcome("joint", 0, 90.0, 88.0),
        outcome("alone", 0, 89.0, 8.0),
        outcome("alone", 1, 91.0, 12.0),
        outcome("joint", 1, 91.0, 92.0),
        outcome("delta-8", 0, 90.0, 70.0, seconds=3.0),
        outcome("delta-8", 1, 90.0, 78.0, seconds=8.0),
        outcome("gradient-0", 0, 90.0, 88.0, seconds=4.0),
        outcome("gradient-0", 1, 90.0, 92.0, seconds=8.0),
    ]
    return {summary.row: summary for summary in summarize(outcomes)}


def test_recovery_is_the_share_of_joint_trainings_gain() -> None:
    found = summaries_of_two_seeds()
    assert list(found) == ["alone", "gradient-0", "delta-8", "joint"], "in the table's order"
    recovery = {row: summary.recovery["h2"] for row, summary in found.items()}
    assert recovery == {"alone": 0.0, "gradient-0": 100.0, "delta-8": 80.0, "joint": 100.0}
    assert found["delta-8"].time_ratio == pytest.approx((3 / 4 + 8 / 8) / 2)


def test_no_recovery_of_a_gain_that_is_none() -> None:
    found = summaries_of_two_seeds()
    assert all(summary.recovery["h1"] is None for summary in found.values())
    (note,) = notes(list(found.values()))
    assert "h1: joint training changes it by +0.5 points" in note


def test_without_joint_training_nothing_is_recovered() -> None:
    (summary,) = summarize([outcome("alone", 0, 90.0, 10.0)])
    assert summary.recovery == {"h1": None, "h2": None}
    assert notes([summary]) == ["recovery needs the rows 'alone' and 'joint'"]
    assert summary.time_ratio is None


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "exchanges.png"
    plot(list(summaries_of_two_seeds().values()), "two seeds", path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("row", ROWS.values())
def test_that_the_recipes_take_the_flags_of_a_row(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, steps = ("--task", "overlap", "--seed", 3), ("--max_train_steps", 7)
    for role, command in commands(row, tmp_path, training, steps).items():
        if row.name == "seed":
            continue  # a script of its own
        flags = [str(flag) for flag in command.flags]
        if row.late and role == "donor":
            assert flags.pop(0) == str(row.late)
        monkeypatch.setattr(sys, "argv", [role, *flags])
        args = PARSERS[role]()
        assert (args.task, args.seed, args.output_dir) == ("overlap", 3, tmp_path / role)
        if role == "donor":
            assert args.has_bound is (row.exchange in ("head", "distill"))
            assert not (args.has_bound and args.require_peer)
        else:
            assert args.max_train_steps == 7
        if row.exchange:
            assert args.exchange == row.exchange


def test_a_late_payload_waits_for_its_step(tmp_path: Path) -> None:
    transport = DirectoryTransport(tmp_path)
    publisher = LatePublisher(2, transport, "donor", "run", 10_000)

    sums = torch.zeros(1)  # in whose place those of the next payload are put

    def visible() -> list[int]:
        paths = [transport.path("donor", number) for number in transport.sequences("donor")]
        records = [parse_record(path.read_bytes()) for path in paths]
        steps = [record.header.receiver_step for record in records]
        payloads = [record for record in records if record.header.kind == "gradient"]
        assert [int(payload.tensors["w"]) for payload in payloads] == steps[: len(payloads)]
        return steps

    def give(step: int, kind: Kind = "gradient") -> None:
        header = Header(
            kind=kind, run_id="run", job="donor", attempt=1, receiver_step=step, weights_digest="w"
        )
        publisher.publish(header, {"w": sums.fill_(step)} if kind == "gradient" else {})

    for step in (0, 1, 3):  # the weights after 2 steps were missed
        publisher.release(step)
        give(step)
    assert visible() == [0, 1], "at step 3 the payloads of steps 0 and 1 are due"
    assert publisher.num_records == 2
    publisher.release(3)
    assert visible() == [0, 1]
    publisher.release(4)
    assert visible() == [0, 1, 3], "that of step 2, which is due, will never come"
    publisher.release(5)
    give(5)
    assert visible() == [0, 1, 3]
    give(5, "end")
    assert visible() == [0, 1, 3, 5], "an end is not late"
    assert publisher.num_records == 4
