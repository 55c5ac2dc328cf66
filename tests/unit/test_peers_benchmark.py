"""The benchmark's hand-overs: what arrives is what was sent, by every way, and nobody is left."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from toolkit.benchmarks.bridge.peer_job import WAYS, random_tensors
from toolkit.benchmarks.bridge.peers import measure_peers, measure_size
from toolkit.benchmarks.bridge.ways import Side
from toolkit.launching import JobFailedError

SIDES: tuple[Side, Side] = ("receiver", "donor")


def processes_of(directory: Path) -> list[psutil.Process]:
    """The processes that work in a directory, which is among their arguments."""
    found = psutil.process_iter(["cmdline"])
    return [p for p in found if any(str(directory) in word for word in p.info["cmdline"] or [])]


@pytest.mark.slow
def test_that_every_way_has_a_row(tmp_path: Path) -> None:
    rows = {row["way"]: row for row in measure_peers(tmp_path, [0.001], repeats=2).rows}
    lacking = {title: way.lacks() for title, way in WAYS.items() if way.lacks()}
    assert list(rows) == [*(title for title in WAYS if title not in lacking), *lacking]
    assert {title: rows.pop(title)["ms"] for title in lacking} == lacking
    for row in rows.values():
        assert row["MB"] == 0.004
        assert float(row["ms"]) > 0
        for column, ratio, to in (("ms", "/ raw", "raw bytes"), ("stall", "/ seed", "torch.save")):
            expected = float(row[column]) / float(rows[to][column])
            assert row[ratio] == pytest.approx(expected, rel=0.02)  # above 100 ms they are whole
    assert [name for name, row in rows.items() if row["torn"] != "never"] == ["torch.save"]
    assert not processes_of(tmp_path)


@pytest.mark.slow
def test_that_both_processes_end_if_one_fails(tmp_path: Path) -> None:
    Path(tmp_path, "way-0", "receiver-0.pt").mkdir(parents=True)  # the donor finds no whole file
    with pytest.raises(JobFailedError, match="receiver ended with status 1"):
        measure_size(tmp_path, 0.001, ["torch.save"], repeats=1)
    assert not processes_of(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    "title", ["bridge", "bridge, late", "torch.save", "save, rename", "save, fsync", "DCP async"]
)
def test_that_what_arrives_is_what_was_sent(title: str, tmp_path: Path) -> None:
    if reason := WAYS[title].lacks():
        pytest.skip(reason)
    tensors = {side: random_tensors(side, 1000) for side in SIDES}
    receiver, donor = (WAYS[title](tmp_path, side, tensors[side]) for side in SIDES)
    for number in range(3):
        receiver.send(number)
        donor.wait(number)
        assert donor.is_right(donor.receive(number), tensors["receiver"])
        donor.send(number)
        receiver.wait(number)
        received = receiver.receive(number)
        assert receiver.is_right(received, tensors["donor"])
        assert not receiver.is_right(received, tensors["receiver"])
    assert not list(tmp_path.glob("*.pt")), "who reads a file deletes it"
    for way in (receiver, donor):
        way.close()
        assert way.num_torn == 0
