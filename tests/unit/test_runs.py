"""Who joins whom, in any order of starts."""

from __future__ import annotations

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.unit.starts import PEER, SCHEMAS, Jobs, bridge_of
from toolkit.bridge.agreement import has_ended
from toolkit.bridge.config import Exchange, Role
from toolkit.bridge.runs import Attachment

each_role = pytest.mark.parametrize("role", ["donor", "receiver"])


@each_role
def test_that_the_second_job_joins_the_first(jobs: Jobs, role: Role) -> None:
    first = jobs.start(role)
    second = jobs.start(PEER[role])

    assert first == second
    assert first.run_dir == jobs.runs_dir / "0001"
    assert first.attempt == 1
    agreed = json.loads((first.run_dir / "bridge" / "run.json").read_bytes())
    assert (agreed["run_id"], agreed["founder"]) == (first.run_id, role)
    assert agreed["schema"] == SCHEMAS["backbone"]
    assert {name: agreed[name] for name in ("scope", "unit")} == {"scope": "all", "unit": "samples"}
    head = json.loads((first.run_dir / "bridge" / "heads" / "heads.h2.json").read_bytes())
    assert head == {"founder": role, "schema": SCHEMAS["heads.h2"]}


def test_that_the_same_commands_typed_again_begin_a_new_run(jobs: Jobs) -> None:
    old = [jobs.start("donor"), jobs.start("receiver")]
    new = [jobs.start("receiver"), jobs.start("donor")]

    assert [attachment.run_dir.name for attachment in old + new] == ["0001", "0001", "0002", "0002"]
    assert old[0].run_id != new[0].run_id


@each_role
def test_that_nobody_joins_a_dead_job(jobs: Jobs, role: Role) -> None:
    jobs.start(role, beats=False)

    assert jobs.start(PEER[role]).run_dir.name == "0002"


@each_role
def test_that_nobody_joins_a_job_that_has_ended(jobs: Jobs, role: Role) -> None:
    first = jobs.start(role)
    jobs.publish(first, role)
    assert has_ended(bridge_of(first), role)
    assert not has_ended(bridge_of(first), PEER[role])

    assert jobs.start(PEER[role]).run_dir.name == "0002"


@pytest.mark.parametrize(
    ("exchange", "joined"), [("auto", True), ("distill", True), ("head", True), ("delta", False)]
)
def test_that_a_receiver_joins_a_donor_that_has_left_its_weights(
    jobs: Jobs, exchange: Exchange, joined: bool
) -> None:
    terms = {"exchange": exchange}
    donor = jobs.start("donor", terms, beats=False, exchange=exchange)
    jobs.leave_weights(donor)
    jobs.publish(donor, "donor")
    receiver = jobs.start("receiver", terms, exchange=exchange)
    assert (receiver.run_dir == donor.run_dir) is joined


@pytest.mark.parametrize(
    "settings",
    [{"keep_payloads": True}, {"scope": "head"}, {"aggregate": "pcgrad"}, {"require_peer": True}],
    ids=str,
)
def test_that_a_receiver_without_use_for_left_weights_waits_for_another_donor(
    jobs: Jobs, settings: dict[str, Any]
) -> None:
    terms = {"exchange": "auto", "scope": settings.get("scope", "all")}
    donor = jobs.start("donor", terms, beats=False)
    jobs.leave_weights(donor)
    jobs.publish(donor, "donor")
    receiver = jobs.start("receiver", terms, **settings)
    assert receiver.run_dir != donor.run_dir
    assert jobs.start("donor", terms).run_dir == receiver.run_dir


def test_that_a_donor_joins_a_receiver_that_lives_on_what_an_earlier_one_has_left(
    jobs: Jobs,
) -> None:
    terms = {"exchange": "auto"}
    yesterday = jobs.start("donor", terms, beats=False)
    jobs.leave_weights(yesterday)
    jobs.publish(yesterday, "donor")
    receiver = jobs.start("receiver", terms)
    assert receiver.run_dir == yesterday.run_dir
    today = jobs.start("donor", terms)
    assert (today.run_dir, today.attempt) == (receiver.run_dir, 2)
    assert jobs.start("donor", terms).run_dir != receiver.run_dir, "the role is taken"


def test_that_only_the_newest_record_can_be_an_end(jobs: Jobs) -> None:
    run = jobs.start("receiver")
    assert not has_ended(bridge_of(run), "receiver")
    jobs.publish(run, "receiver")
    jobs.publish(run, "receiver", "weights")
    assert not has_ended(bridge_of(run), "receiver"), "a resumed receiver goes on"
    jobs.publish(run, "receiver")
    bridge_of(run).path("receiver", 3).write_bytes(b"something else")
    assert has_ended(bridge_of(run), "receiver")


@pytest.mark.parametrize(("num_donors", "num_receivers"), [(4, 4), (8, 0), (6, 2)])
def test_that_many_starts_at_once_share_runs_in_pairs(
    jobs: Jobs, num_donors: int, num_receivers: int
) -> None:
    donors: list[Role] = ["donor"] * num_donors
    receivers: list[Role] = ["receiver"] * num_receivers
    roles = donors + receivers
    barrier = threading.Barrier(len(roles))

    def start(role: Role) -> Attachment:
        barrier.wait()
        return jobs.start(role)

    with ThreadPoolExecutor(len(roles)) as pool:
        attachments = list(pool.map(start, roles))

    by_run = jobs.claims()
    assert {attachment.attempt for attachment in attachments} == {1}
    assert all(count == 1 for run in by_run.values() for count in run.values())
    assert sum((Counter(run) for run in by_run.values()), Counter()) == Counter(roles)
    for attachment in attachments:
        agreed = json.loads((attachment.run_dir / "bridge" / "run.json").read_bytes())
        assert agreed["run_id"] == attachment.run_id


@each_role
def test_that_two_starts_at_the_same_moment_meet(
    jobs: Jobs, role: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    # who loses the race for a number makes the next one instead of joining the winner, and
    # each of the two waits for the other in a run of its own.
    mkdir = Path.mkdir
    overtaken: list[Any] = []

    def mkdir_too_late(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name == "0001" and not overtaken:
            overtaken.append(None)
            overtaken[0] = jobs.start(PEER[role])
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir_too_late)

    assert [jobs.start(role)] == overtaken
