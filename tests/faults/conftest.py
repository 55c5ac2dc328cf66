"""Fixtures for faults of disks, processes, clocks and hosts."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from tests.faults.running import FaultyRecipes, undisturbed_weights
from tests.launching import Launcher
from tests.unit.conftest import fresh_state, jobs  # noqa: F401


@pytest.fixture
def recipes(launcher: Launcher, tmp_path: Path) -> FaultyRecipes:
    """Launches recipes in a directory of the test's own, on disks and clocks that can fail."""
    return FaultyRecipes(launcher, tmp_path)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The receiver's weights after a run in lockstep that nothing disturbs."""
    return undisturbed_weights(tmp_path_factory.mktemp("undisturbed"))
