"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launching import Launcher


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    """Launches jobs, and kills those that are still alive when the test ends, failed or not."""
    with Launcher(tmp_path) as launcher:
        yield launcher
