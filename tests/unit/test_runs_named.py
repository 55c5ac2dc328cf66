"""Runs that the user names, or a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.starts import PEER, Jobs
from toolkit.bridge import runs
from toolkit.bridge.config import Role
from toolkit.bridge.errors import BridgeError
from toolkit.bridge.runs import CHECKPOINT_FILE, Attachment
from toolkit.bridge.transport import DirectoryTransport

each_role = pytest.mark.parametrize("role", ["donor", "receiver"])


@each_role
def test_that_a_named_run_is_founded_joined_and_rejoined(jobs: Jobs, role: Role) -> None:
    first = jobs.start(role, run="mine")
    second = jobs.start(PEER[role], run="mine")
    assert first == second
    jobs.kill_all()
    again = jobs.start(role, run="mine")

    assert (again.run_dir, again.run_id) == (jobs.runs_dir / "mine", first.run_id)
    assert again.attempt == 2


def test_that_a_named_run_is_not_joined_by_chance(jobs: Jobs) -> None:
    jobs.start("donor", run="mine")

    assert jobs.start("receiver").run_dir.name == "0001"


@pytest.mark.parametrize("name", ["../else", "a/b", "", ".", ".."])
def test_that_a_run_name_is_a_plain_name(jobs: Jobs, name: str) -> None:
    with pytest.raises(BridgeError, match="must be a plain directory name"):
        jobs.start("donor", run=name)


@each_role
@pytest.mark.parametrize("attribute", [{"run": "mine"}, "checkpoint"])
def test_that_a_living_jobs_role_is_refused(
    jobs: Jobs, role: Role, attribute: Any, tmp_path: Path
) -> None:
    first = jobs.start(role, run="mine")
    if attribute == "checkpoint":
        attribute = {"resume_from_checkpoint": save(tmp_path, first, role)}

    with pytest.raises(
        BridgeError, match=f"has a living {role} .process .*end that one first"
    ) as e:
        jobs.start(role, **attribute)
    assert "(--run)" in str(e.value)
    assert "--resume_from_checkpoint" in str(e.value)
    assert jobs.claims() == {"mine": {role: 1}}


def test_that_a_job_that_starts_meanwhile_is_refused_too(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    # between the look for a living job and the claim, another one takes the role; the claim
    # then takes the number after it, and two receivers live in one run.
    look = runs._refuse_living
    overtaken: list[str] = []

    def look_and_be_overtaken(transport: DirectoryTransport, role: Role, job: str) -> None:
        look(transport, role, job)
        if not overtaken:
            overtaken.append(job)
            jobs.start(role, run="mine")

    jobs.start("donor", run="mine", beats=False)
    monkeypatch.setattr(runs, "_refuse_living", look_and_be_overtaken)

    with pytest.raises(BridgeError, match="living receiver"):
        jobs.start("receiver", run="mine")


@pytest.mark.parametrize(
    ("role", "ended"), [("donor", "receiver"), ("receiver", "receiver"), ("receiver", "donor")]
)
def test_that_a_named_run_that_is_over_is_refused(jobs: Jobs, role: Role, ended: Role) -> None:
    run = jobs.start(ended, run="mine", beats=False)
    jobs.publish(run, ended)

    with pytest.raises(BridgeError, match=f"'mine' is over: its {ended} has ended") as caught:
        jobs.start(role, run="mine")
    for way_out in ("leave --run out", "name another one", "--resume_from_checkpoint"):
        assert way_out in str(caught.value)


def save(tmp_path: Path, attachment: Attachment, role: Role, **changes: Any) -> Path:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    content = {"job": role, "run": attachment.run_dir.name, "run_id": attachment.run_id}
    (checkpoint / CHECKPOINT_FILE).write_text(json.dumps({**content, **changes}))
    return checkpoint


@each_role
def test_that_a_checkpoint_leads_back_to_its_run(jobs: Jobs, role: Role, tmp_path: Path) -> None:
    first = jobs.start(role, beats=False)
    jobs.publish(first, role)
    checkpoint = save(tmp_path, first, role)
    jobs.start("donor")

    resumed = jobs.start(role, resume_from_checkpoint=checkpoint)

    assert (resumed.run_dir, resumed.run_id) == (first.run_dir, first.run_id)
    assert resumed.attempt == 2


def test_that_a_checkpoint_of_the_other_job_is_refused(jobs: Jobs, tmp_path: Path) -> None:
    checkpoint = save(tmp_path, jobs.start("donor", beats=False), "donor")

    with pytest.raises(BridgeError, match="checkpoint of the donor, not the receiver"):
        jobs.start("receiver", resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("changes", [{"run": "0007"}, {"run_id": "other"}])
def test_that_a_checkpoint_of_another_runs_directory_is_refused(
    jobs: Jobs, tmp_path: Path, changes: dict[str, str]
) -> None:
    checkpoint = save(tmp_path, jobs.start("donor", beats=False), "donor", **changes)

    with pytest.raises(BridgeError, match=r"which is not in .*\(--runs_dir\)"):
        jobs.start("donor", resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("content", [None, "", '{"job": ', "[]", "{}"])
def test_that_what_is_no_checkpoint_is_refused(
    jobs: Jobs, tmp_path: Path, content: str | None
) -> None:
    # for a JSON file without the bridge's fields ("[]", "{}") it is a TypeError or KeyError.
    if content is not None:
        (tmp_path / CHECKPOINT_FILE).write_text(content)

    with pytest.raises(BridgeError, match="is no complete checkpoint of a bridged job"):
        jobs.start("donor", resume_from_checkpoint=tmp_path)
