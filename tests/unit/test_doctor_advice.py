"""Which settings follow from what a file system gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from toolkit import BridgeConfig
from toolkit.doctor.advice import advise, exchange_seconds
from toolkit.doctor.report import Advice, Costs, Place, Promises, Times

GIB = 2**30
PLACE = Place(
    file_system="ext4", mount_point="/", mount_options=["rw"], free_bytes=900 * GIB,
    free_inodes=10**7, max_name_bytes=255, mode="755", others_may_write=False,
    group_may_write=False,
)  # fmt: skip
PROMISES = Promises(
    hard_links=True, link_never_replaces=True, create_is_exclusive=True, mkdir_is_exclusive=True,
    rename_is_atomic=True, pread_is_right=True, mmap_is_right=True,
)  # fmt: skip
# An exchange of 100 bytes: 2 (0.01 + 100 / 2000 + 0.02 + 100 / 5000) = 0.2 s.
COSTS = Costs(
    fsync_file=Times(p50=0.1, p99=0.2, num_tries=9),
    fsync_directory=Times(p50=0.1, p99=0.2, num_tries=9),
    publish=Times(p50=0.01, p99=9.0, num_tries=9),
    visibility=Times(p50=0.02, p99=9.0, num_tries=9),
    written_bytes=100, write_bytes_per_second=2000, read_bytes_per_second=5000, clock_skew=0.0,
)  # fmt: skip


def advice(
    place: dict[str, Any] | None = None,
    promises: dict[str, Any] | None = None,
    costs: dict[str, Any] | None = None,
    step_seconds: float = 2.0,
) -> Advice:
    """For a good place, but for these changes."""
    return advise(
        Path("runs"),
        dataclasses.replace(PLACE, **(place or {})),
        dataclasses.replace(PROMISES, **(promises or {})),
        dataclasses.replace(COSTS, **(costs or {})),
        payload_bytes=100,
        step_seconds=step_seconds,
    )


def test_that_an_exchange_writes_sees_and_reads_both_ways() -> None:
    assert exchange_seconds(COSTS, 100) == pytest.approx(0.2, rel=1e-12)
    assert exchange_seconds(dataclasses.replace(COSTS, visibility=None), 100) is None
    assert exchange_seconds(dataclasses.replace(COSTS, publish=None), 100) is None


def test_that_a_good_place_needs_no_settings() -> None:
    found = advice(step_seconds=2.001)

    assert (found.obstacles, found.settings, found.notes) == ([], {}, [])
    assert found.reasons == [
        "an exchange of 100 bytes each way takes 0.2 s, 10 % of a step of 2.001 s: lockstep "
        "(--exchange auto, the default) fits"
    ]


@pytest.mark.parametrize(
    ("step_seconds", "settings", "flags"),
    [
        (1.999, {"exchange": "delta", "local_steps": 2}, "--exchange delta --local_steps 2 "),
        (0.5, {"exchange": "delta", "local_steps": 4}, "--local_steps 4 it is 10 %"),
        (0.3, {"exchange": "delta", "local_steps": 8}, "--local_steps 8 it is 8 %"),
        (0.016, {"exchange": "delta", "local_steps": 128}, "--local_steps 128 "),
        (0.015, {"exchange": "distill", "publish_every": 256}, "distill --publish_every 256"),
    ],
)
def test_that_an_exchange_that_is_dear_for_the_step_is_made_rarely(
    step_seconds: float, settings: dict[str, Any], flags: str
) -> None:
    found = advice(step_seconds=step_seconds)

    assert found.settings == settings
    assert flags in found.reasons[0]
    BridgeConfig(**settings)


def test_that_little_room_means_small_budgets() -> None:
    assert advice(place={"free_bytes": 50 * GIB, "free_inodes": None}).settings == {}
    found = advice(place={"free_bytes": 49 * GIB, "free_inodes": 99_999})

    assert found.settings == {"payload_budget_gib": 24.0, "payload_budget_files": 49_999}
    assert "--payload_budget_gib 24" in found.reasons[1]
    assert "--payload_budget_files 49999" in found.reasons[2]
    assert BridgeConfig(**found.settings).payload_budget_gib == 24
    assert found.obstacles == []


@pytest.mark.parametrize(
    ("promises", "obstacle"),
    [
        ({"link_never_replaces": False}, "a link to a taken name did not fail"),
        ({"create_is_exclusive": False}, "O_EXCL on a taken name did not fail"),
        ({"mkdir_is_exclusive": False}, "mkdir of a taken name did not fail"),
        ({"rename_is_atomic": False}, "was not always there and whole"),
        ({"pread_is_right": False}, "pread gave other bytes"),
        ({"mmap_is_right": False}, "mmap gave other bytes"),
        ({"hard_links": False, "link_never_replaces": None}, "cannot have a second name"),
    ],
)
def test_that_each_broken_promise_is_an_obstacle(promises: dict[str, Any], obstacle: str) -> None:
    (found,) = advice(promises=promises).obstacles

    assert obstacle in found
    assert "Give --runs_dir another file system" in found


def test_that_blindness_and_fullness_are_obstacles() -> None:
    (blind,) = advice(costs={"visibility": None}).obstacles
    assert "another process did not see a new file" in blind
    assert advice(place={"free_bytes": 400}).obstacles == []
    (full,) = advice(place={"free_bytes": 399}).obstacles
    assert "399 bytes are free, and 4 records of 100 bytes must fit" in full


@pytest.mark.parametrize(
    ("place", "note"),
    [
        ({"file_system": "nfs4"}, "lookupcache=positive"),
        ({"file_system": "nfs", "mount_options": ["soft", "lookupcache=pos"]}, "mount it hard"),
        ({"file_system": "tmpfs"}, "memory of this host"),
        ({"others_may_write": True, "mode": "757"}, "every user may write in runs (mode 757)"),
        ({"group_may_write": True}, "its group may write in runs"),
    ],
)
def test_that_what_is_good_to_know_is_noted(place: dict[str, Any], note: str) -> None:
    (found,) = advice(place=place).notes
    assert note in found


def test_that_a_mount_that_is_right_and_clocks_that_agree_are_not_noted() -> None:
    fitting = {"file_system": "nfs", "mount_options": ["rw", "lookupcache=none"]}
    assert advice(place=fitting).notes == []
    assert advice(costs={"clock_skew": -0.9}).notes == []
    (note,) = advice(costs={"clock_skew": -1.5}).notes
    assert "-1.5 s off" in note
