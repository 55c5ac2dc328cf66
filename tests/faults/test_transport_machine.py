"""The transport under any order of events, and the fates of what it carries."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.faults.transport_machine import TransportMachine

# The same examples at every run, few of them; and new ones, many of them.
FEW = settings(
    max_examples=15, stateful_step_count=30, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
MANY = settings(FEW, max_examples=1000, stateful_step_count=60, derandomize=False)


def test_that_streams_are_as_a_plain_model_says(tmp_path: Path) -> None:
    run_state_machine_as_test(lambda: TransportMachine(tmp_path), settings=FEW)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_that_streams_are_as_a_plain_model_says_in_many_orders(tmp_path: Path) -> None:
    run_state_machine_as_test(lambda: TransportMachine(tmp_path), settings=MANY)
