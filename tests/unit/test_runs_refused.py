"""Jobs that do not fit a run, and directories that no run fits into."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.unit.starts import PEER, SCHEMAS, Jobs, bridge_of
from toolkit.bridge.agreement import has_ended
from toolkit.bridge.config import Role
from toolkit.bridge.errors import BridgeError, SchemaMismatchError
from toolkit.bridge.transport import DirectoryTransport

each_role = pytest.mark.parametrize("role", ["donor", "receiver"])


def with_backbone(schema: dict[str, Any]) -> dict[str, Any]:
    return {"schemas": {"backbone": schema}}


@each_role
def test_that_another_schema_is_refused_tensor_by_tensor(jobs: Jobs, role: Role) -> None:
    jobs.start(PEER[role], with_backbone({"w": ["float32", [2, 3]], "b": ["float32", [4]]}))

    with pytest.raises(SchemaMismatchError) as caught:
        jobs.start(role, with_backbone({"w": ["float32", [3, 2]], "c": ["int64", []]}))
    for line in (
        f"this {role} does not fit run 0001, founded by the {PEER[role]}",
        f"\n  b: {role} absent, {PEER[role]} float32 (4,)",
        f"\n  c: {role} int64 (), {PEER[role]} absent",
        f"\n  w: {role} float32 (3, 2), {PEER[role]} float32 (2, 3)",
        "--run NAME",
    ):
        assert line in str(caught.value)


@each_role
@pytest.mark.parametrize(
    "terms", [{"schemas": {"backbone": {}}}, {"scope": "head"}, {"unit": "tokens"}], ids=str
)
def test_that_a_refused_job_leaves_its_role_to_another(
    jobs: Jobs, role: Role, terms: dict[str, Any]
) -> None:
    first = jobs.start(PEER[role])
    with pytest.raises(SchemaMismatchError, match=f"{next(iter(terms))}|w: "):
        jobs.start(role, terms)
    assert jobs.claims() == {"0001": {PEER[role]: 1}}

    assert jobs.start(role) == first


def test_that_a_job_must_fit_its_own_earlier_starts(jobs: Jobs) -> None:
    jobs.start("donor", run="mine", beats=False)

    with pytest.raises(SchemaMismatchError, match="founded by the earlier donor"):
        jobs.start("donor", {"unit": "tokens"}, run="mine")


BUDGETS = [
    ({"payload_budget_files": 29}, "--payload_budget_files", "30"),
    ({"payload_budget_gib": 1e-9}, "--payload_budget_gib", "0.0293"),
]
CHECKPOINTS = {"checkpoint_interval": 10, "checkpoints_kept": 2}


@each_role
@pytest.mark.parametrize(("budget", "flag", "need"), BUDGETS, ids=["files", "gib"])
def test_that_a_budget_that_cannot_hold_the_checkpoints_is_refused(
    jobs: Jobs, role: Role, budget: dict[str, float], flag: str, need: str
) -> None:
    claims: dict[Role, dict[str, Any]] = {"donor": budget, "receiver": CHECKPOINTS}
    jobs.start(PEER[role], claim=claims[PEER[role]])

    with pytest.raises(BridgeError, match=f"every 10 steps and keeps 2 of them.*{need}.*{flag}"):
        jobs.start(role, claim=claims[role])


def test_that_a_budget_that_holds_the_checkpoints_is_taken(jobs: Jobs) -> None:
    jobs.start("donor", claim={"payload_budget_files": 30})

    assert jobs.start("receiver", claim=CHECKPOINTS).run_dir.name == "0001"


def test_that_a_receiver_without_checkpoints_needs_no_budget(jobs: Jobs) -> None:
    jobs.start("receiver")

    assert jobs.start("donor", claim={"payload_budget_files": 1}).run_dir.name == "0001"


def test_that_a_budget_is_refused_before_the_role_is_taken(jobs: Jobs) -> None:
    # the role is claimed first. The donor that heeds the message and starts again with a
    # larger budget finds its role taken, begins a run of its own, and the receiver waits in vain.
    first = jobs.start("receiver", claim=CHECKPOINTS)
    with pytest.raises(BridgeError, match="payload_budget_files"):
        jobs.start("donor", claim={"payload_budget_files": 1})

    assert jobs.start("donor") == first


@each_role
@pytest.mark.parametrize("below", ["", "runs"])
def test_that_a_file_in_the_place_of_the_runs_directory_is_refused(
    jobs: Jobs, role: Role, tmp_path: Path, below: str
) -> None:
    (tmp_path / "file").write_bytes(b"")
    jobs.runs_dir = tmp_path / "file" / below

    with pytest.raises(BridgeError, match=r"cannot use the runs directory .*file.*\(--runs_dir\)"):
        jobs.start(role)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_that_a_directory_without_permission_is_refused(jobs: Jobs) -> None:
    jobs.runs_dir.mkdir()
    jobs.runs_dir.chmod(0o500)

    with pytest.raises(BridgeError, match="Permission denied"):
        jobs.start("donor")


def test_that_other_names_in_the_runs_directory_are_let_alone(jobs: Jobs) -> None:
    for name in ("notes", "001", "0001x", ".hidden"):
        (jobs.runs_dir / name).mkdir(parents=True)

    assert jobs.start("donor").run_dir.name == "0001"


def test_that_a_file_with_a_number_is_no_run(jobs: Jobs) -> None:
    # any file whose name is four digits or more makes every bare start fail.
    jobs.runs_dir.mkdir()
    (jobs.runs_dir / "2024").write_bytes(b"")

    assert jobs.start("donor").run_dir.is_dir()


@pytest.mark.timeout(5)
def test_that_a_fifo_in_a_records_place_holds_up_nobody(jobs: Jobs) -> None:
    # has_ended() opens a record without O_NONBLOCK, and waits for a writer for ever.
    run = jobs.start("donor")
    os.mkfifo(DirectoryTransport(run.run_dir / "bridge").path("donor", 0))

    assert not has_ended(bridge_of(run), "donor")


def test_that_heads_that_differ_are_told_beside_the_backbone(jobs: Jobs) -> None:
    jobs.start("receiver", {"schemas": {**SCHEMAS, "heads.h3": {}}})
    head = {"heads.h2": {"v": ["float32", [4]]}, "heads.h4": {}}
    other = {"backbone": {"w": ["float32", [2, 2]]}, **head}

    with pytest.raises(SchemaMismatchError) as caught:
        jobs.start("donor", {"schemas": other})
    for line in ("\n  w: donor float32 (2, 2)", "\n  v: donor float32 (4,), receiver float32 (3,)"):
        assert str(caught.value).count(line) == 1
    heads = jobs.runs_dir / "0001" / "bridge" / "heads"
    assert sorted(path.stem for path in heads.iterdir()) == ["heads.h2", "heads.h3"]


def test_that_a_head_that_the_receiver_does_not_have_is_refused(jobs: Jobs) -> None:
    jobs.start("receiver")
    with pytest.raises(SchemaMismatchError, match=r"the receiver takes those for heads\.h2"):
        jobs.start("donor", {"schemas": {"backbone": SCHEMAS["backbone"], "heads.h3": {}}})
