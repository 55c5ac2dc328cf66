"""What unit tests have in common."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.jobs import reset


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """Nothing of one test's Accelerator is left for the next."""
    reset()
    yield
    reset()
