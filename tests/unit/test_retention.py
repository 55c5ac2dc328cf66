"""What the checkpoints of a run may ask for again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.bridge.retention import CheckpointCursors
from toolkit.bridge.runs import CHECKPOINT_FILE
from toolkit.bridge.transport import DirectoryTransport


def save(directory: Path, cursor: int, **changes: Any) -> Path:
    directory.mkdir(parents=True)
    content = {"job": "receiver", "run_id": "mine", "donors": {"donor": {"cursor": cursor}}}
    (directory / CHECKPOINT_FILE).write_text(json.dumps({**content, **changes}))
    return directory


@pytest.fixture
def cursors(tmp_path: Path) -> CheckpointCursors:
    return CheckpointCursors(DirectoryTransport(tmp_path / "bridge"), "mine", will_save=False)


def oldest(cursors: CheckpointCursors, cursor: int) -> int:
    """Of the only donor."""
    return cursors.oldest_needed({"donor": cursor})["donor"]


def test_that_without_a_checkpoint_nothing_is_needed_again(cursors: CheckpointCursors) -> None:
    assert oldest(cursors, 7) == 7
    assert oldest(cursors, 8) == 8


def test_that_all_is_needed_until_the_first_of_the_checkpoints_to_come(tmp_path: Path) -> None:
    transport = DirectoryTransport(tmp_path / "bridge")
    cursors = CheckpointCursors(transport, "mine", will_save=True)
    assert oldest(cursors, 7) == 0

    save(tmp_path / "step_5", 5)
    cursors.saved_below(tmp_path)
    assert oldest(cursors, 7) == 5


def test_that_the_oldest_checkpoint_counts(tmp_path: Path, cursors: CheckpointCursors) -> None:
    for cursor in (10, 5, 20):
        save(tmp_path / f"step_{cursor}", cursor)
    cursors.saved_below(tmp_path)

    assert oldest(cursors, 30) == 5
    assert oldest(cursors, 31) == 5


def test_that_a_present_cursor_behind_the_checkpoints_counts(
    tmp_path: Path, cursors: CheckpointCursors
) -> None:
    save(tmp_path / "later_attempt", 10)
    cursors.saved_below(tmp_path)

    assert oldest(cursors, 4) == 4


def test_that_deleted_checkpoints_are_noticed_at_the_next_save(
    tmp_path: Path, cursors: CheckpointCursors
) -> None:
    old = save(tmp_path / "step_5", 5)
    cursors.saved_below(tmp_path)
    assert oldest(cursors, 30) == 5
    (old / CHECKPOINT_FILE).unlink()
    old.rmdir()
    save(tmp_path / "step_20", 20)
    cursors.saved_below(tmp_path)

    assert oldest(cursors, 30) == 20


def test_that_checkpoints_in_several_places_count(
    tmp_path: Path, cursors: CheckpointCursors
) -> None:
    for place, cursor in (("a", 10), ("b", 6)):
        save(tmp_path / place / "step", cursor)
        cursors.saved_below(tmp_path / place)

    assert oldest(cursors, 30) == 6


def test_that_other_runs_and_the_donors_checkpoints_do_not_count(
    tmp_path: Path, cursors: CheckpointCursors
) -> None:
    save(tmp_path / "other_run", 1, run_id="other")
    save(tmp_path / "donors", 2, job="donor")
    (tmp_path / "no_checkpoint").mkdir()
    (tmp_path / "file").write_bytes(b"")
    save(tmp_path / "mine", 9)
    cursors.saved_below(tmp_path)

    assert oldest(cursors, 30) == 9


def test_that_a_checkpoint_counts_once_all_of_it_is_synced(
    tmp_path: Path, cursors: CheckpointCursors, synced: list[int]
) -> None:
    checkpoint = save(tmp_path / "step_5", 5)
    (checkpoint / "below").mkdir()
    (checkpoint / "below" / "model.safetensors").write_bytes(b"weights")
    cursors.saved_below(tmp_path)
    oldest(cursors, 30)

    expected = {path.stat().st_ino for path in (tmp_path, checkpoint, *checkpoint.rglob("*"))}
    assert {*synced} == expected


@pytest.mark.parametrize("content", ["", '{"job": "receiver", "run_i'], ids=["empty", "half"])
def test_that_a_half_written_checkpoint_is_passed_over(
    tmp_path: Path, cursors: CheckpointCursors, content: str
) -> None:
    # a checkpoint that a kill cut short lies beside the good ones; the JSONDecodeError ends
    # the resumed receiver at the first commit after its next save.
    save(tmp_path / "step_5", 5)
    (save(tmp_path / "step_10", 10) / CHECKPOINT_FILE).write_text(content)
    save(tmp_path / "step_15", 15)
    cursors.saved_below(tmp_path)

    assert oldest(cursors, 30) == 5


def test_that_a_dangling_link_does_not_hide_a_checkpoint(
    tmp_path: Path, cursors: CheckpointCursors
) -> None:
    # fsync of the link fails with FileNotFoundError, which is taken for a deleted checkpoint:
    # the donor then prunes what a resume from it needs.
    checkpoint = save(tmp_path / "step_5", 5)
    (checkpoint / "latest").symlink_to("nowhere")
    cursors.saved_below(tmp_path)

    assert oldest(cursors, 30) == 5
