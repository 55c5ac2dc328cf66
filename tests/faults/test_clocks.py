"""Wall clocks that are wrong, differ between the jobs and step back: nothing depends on them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from torch import Tensor

import toolkit.bridge
from tests.faults.running import FaultyRecipes, Role, check_undisturbed
from tests.recipes.running import TIMEOUT

HOUR = 3600
WALL_CLOCK = {
    *("time.time", "time.time_ns", "time.ctime", "time.localtime", "time.gmtime"),
    *("datetime.now", "datetime.utcnow", "datetime.today", "date.today"),
}


@pytest.mark.faults
def test_clocks_that_are_hours_apart_and_step_back_change_nothing(
    recipes: FaultyRecipes, undisturbed: dict[str, Tensor]
) -> None:
    offsets: dict[Role, int] = {"donor": HOUR, "receiver": -HOUR}
    jobs = []
    for role, offset in offsets.items():
        recipes.set_clock(role, offset)
        jobs.append(recipes.start(role))
    recipes.await_payload(100)
    for role, offset in offsets.items():
        recipes.set_clock(role, -offset)
    for job in jobs:
        job.wait(TIMEOUT)
        assert "TRAINING ALONE" not in job.output()
    began = {role: curves_began(recipes.path("0001", role)) for role in offsets}
    assert abs(began["donor"] - began["receiver"] - 2 * HOUR) < HOUR, "the clocks were right"
    check_undisturbed(recipes, undisturbed)


def curves_began(directory: Path) -> int:
    """What a job's clock showed when it opened its TensorBoard file, which is named after that."""
    (path,) = directory.glob("events.out.tfevents.*")
    return int(path.name.split(".")[3])


def test_that_the_bridge_never_asks_for_the_time_of_day() -> None:
    sources = sorted(Path(toolkit.bridge.__file__).parent.glob("*.py"))
    assert len(sources) > 30
    for source in sources:
        tree = ast.parse(source.read_text())
        names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not names & WALL_CLOCK, source.name
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime")
            for alias in node.names
        }
        assert not imported, source.name
        # Times of files are another host's clock: they may only be looked at for a change.
        times = {name for name in names if name.rpartition(".")[2].startswith(("st_mtime", "st_c"))}
        assert not times or source.name in ("liveness.py", "transport.py"), (source.name, times)
