"""The transport under any order of events, and the fates of what it carries."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests.faults.fates_machine import FatesMachine
from tests.faults.transport_machine import TransportMachine

# The same examples at every run, few of them; and new ones, many of them.
FEW = settings(
    max_examples=25, stateful_step_count=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
MANY = settings(FEW, max_examples=500, stateful_step_count=60, derandomize=False)


MACHINES: list[type[RuleBasedStateMachine]] = [TransportMachine, FatesMachine]


# What has to happen in the examples, so that they show something.
EVENTS = {
    "TransportMachine": {
        "killed", "pruned", "put aside", "kept", "replay refused", "refused again",
    },
    "FatesMachine": {
        "applied", "dropped", "rejected", "skipped", "resumed", "taken back", "killed", "pruned",
        "begun anew",
    },
}  # fmt: skip


def run(machine: type[RuleBasedStateMachine], directory: Path, how: settings) -> Counter[str]:
    """Run the examples; how often what has happened in them."""
    covered: Counter[str] = Counter()
    here = type(machine.__name__, (machine,), {"directory": directory, "covered": covered})
    run_state_machine_as_test(here, settings=how)
    print(f"{how.max_examples} examples of up to {how.stateful_step_count} steps: {covered}")
    return covered


@pytest.mark.parametrize("machine", MACHINES)
def test_that_all_is_as_a_plain_model_says(
    machine: type[RuleBasedStateMachine], tmp_path: Path
) -> None:
    run(machine, tmp_path, FEW)


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("machine", MACHINES)
def test_that_all_is_as_a_plain_model_says_in_many_orders(
    machine: type[RuleBasedStateMachine], tmp_path: Path
) -> None:
    covered = run(machine, tmp_path, MANY)

    assert EVENTS[machine.__name__] <= {event for event, count in covered.items() if count}
