"""Fixtures for tests of the recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching import Launcher
from tests.recipes.running import Recipes


@pytest.fixture
def recipes(launcher: Launcher, tmp_path: Path) -> Recipes:
    """Launches recipes in a directory of the test's own."""
    return Recipes(launcher, tmp_path)
