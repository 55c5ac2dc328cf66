"""What follows from the measurements of ``gradient-bridge doctor`` for the settings of a bridge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from toolkit.bridge.config import BridgeConfig
from toolkit.doctor.report import Advice, Costs, Place, Promises

SMALL_SHARE = 0.1  # of a step that the exchange may cost
MAX_LOCAL_STEPS = 128  # beyond it the difference of so many steps is of little use
BUDGET_SHARE = 0.5  # of what is free, for the payloads that a donor keeps, where that is little
MIN_PAYLOADS = 4  # that must fit: of either job the newest and the one that is being read
_OTHER_PLACE = "Give --runs_dir another file system"


def exchange_seconds(costs: Costs, payload_bytes: int) -> float | None:
    """What lockstep adds to each step: weights go one way, a gradient the other way.

    Each is written, synced, seen and read. None where that cannot be done.
    """
    if costs.publish is None or costs.visibility is None:
        return None
    write = costs.publish.p50 + payload_bytes / costs.write_bytes_per_second
    read = costs.visibility.p50 + payload_bytes / costs.read_bytes_per_second
    return 2 * (write + read)


def advise(
    directory: Path,
    place: Place,
    promises: Promises,
    costs: Costs,
    payload_bytes: int,
    step_seconds: float,
) -> Advice:
    """Settings that fit, and obstacles.

    Args:
        directory: that was measured.
        place: of it.
        promises: that it keeps.
        costs: that it has.
        payload_bytes: that cross at a time.
        step_seconds: of a training step.
    """
    settings: dict[str, Any] = {}
    reasons: list[str] = []
    seconds = exchange_seconds(costs, payload_bytes)
    if seconds is not None:
        _choose_exchange(seconds, payload_bytes, step_seconds, settings, reasons)
    _choose_budget(place, settings, reasons)
    return Advice(
        obstacles=_obstacles(place, promises, costs, payload_bytes),
        settings=settings,
        reasons=reasons,
        notes=_notes(directory, place, costs),
    )


def _obstacles(place: Place, promises: Promises, costs: Costs, payload_bytes: int) -> list[str]:
    found = []
    if not promises.hard_links:
        found.append(
            "files cannot have a second name (hard link), by which the bridge publishes without "
            f"ever replacing anything. {_OTHER_PLACE}: ext4, XFS, NFS and Lustre have them"
        )
    for kept, what in (
        (promises.link_never_replaces, "a link to a taken name"),
        (promises.create_is_exclusive, "O_EXCL on a taken name"),
        (promises.mkdir_is_exclusive, "mkdir of a taken name"),
    ):
        if kept is False:
            found.append(f"{what} did not fail, so two jobs may take one place. {_OTHER_PLACE}")
    if not promises.rename_is_atomic:
        found.append(f"a file that was replaced was not always there and whole. {_OTHER_PLACE}")
    for kept, what in ((promises.pread_is_right, "pread"), (promises.mmap_is_right, "mmap")):
        if not kept:
            found.append(f"{what} gave other bytes than were written. {_OTHER_PLACE}")
    if promises.hard_links and costs.visibility is None:
        found.append(f"another process did not see a new file. {_OTHER_PLACE}")
    if place.free_bytes < MIN_PAYLOADS * payload_bytes:
        found.append(
            f"{decimal(place.free_bytes)} are free, and {MIN_PAYLOADS} records of "
            f"{decimal(payload_bytes)} must fit: delete old runs, or give another --runs_dir"
        )
    return found


def _choose_exchange(
    seconds: float, payload_bytes: int, step_seconds: float, settings: dict[str, Any],
    reasons: list[str],
) -> None:  # fmt: skip
    share = seconds / step_seconds
    cost = (
        f"an exchange of {decimal(payload_bytes)} each way takes {seconds:.3g} s, "
        f"{100 * share:.0f} % of a step of {step_seconds:g} s"
    )
    every = 2 ** math.ceil(math.log2(max(1.0, share / SMALL_SHARE)))
    if every == 1:
        reasons.append(f"{cost}: lockstep (--exchange auto, the default) fits")
    elif every <= MAX_LOCAL_STEPS:
        settings |= {"exchange": "delta", "local_steps": every}
        reasons.append(
            f"{cost}: with --exchange delta --local_steps {every} it is {100 * share / every:.0f} %"
        )
    else:
        settings |= {"exchange": "distill", "publish_every": every}
        reasons.append(
            f"{cost}: too slow for gradients; take --exchange distill --publish_every {every}, "
            "where no step waits"
        )


def _choose_budget(place: Place, settings: dict[str, Any], reasons: list[str]) -> None:
    default = BridgeConfig()
    budget = default.payload_budget_gib
    if place.free_bytes < budget * 2**30:
        gib = float(f"{BUDGET_SHARE * place.free_bytes / 2**30:.2g}")
        settings["payload_budget_gib"] = gib
        reasons.append(
            f"{decimal(place.free_bytes)} are free, and a donor may keep payloads of {budget:g} "
            f"GiB by default: give it --payload_budget_gib {gib:g}"
        )
    inodes = place.free_inodes
    if inodes is not None and inodes < default.payload_budget_files:
        number = int(BUDGET_SHARE * inodes)
        settings["payload_budget_files"] = number
        reasons.append(
            f"{inodes} more files are possible, and a donor may keep "
            f"{default.payload_budget_files} payloads by default: give it --payload_budget_files "
            f"{number}"
        )


def _notes(directory: Path, place: Place, costs: Costs) -> list[str]:
    found = []
    kind = place.file_system or ""
    if kind.startswith("nfs") and not any(
        o.startswith("lookupcache=") for o in place.mount_options
    ):
        found.append(
            "NFS lets a host believe for up to a minute that a new file is not there: mount with "
            "lookupcache=positive where two hosts are to train in lockstep"
        )
    if kind.startswith("nfs") and {"soft", "softerr"} & {*place.mount_options}:
        found.append(
            "NFS that is mounted soft gives up on a slow server, and what was being written is "
            "lost: mount it hard"
        )
    if kind in ("tmpfs", "ramfs"):
        found.append(f"{kind} is memory of this host: no other host sees it, and a reboot ends it")
    if place.others_may_write or place.group_may_write:
        who = "every user" if place.others_may_write else "its group"
        mask = "go-w" if place.others_may_write else "g-w"
        found.append(
            f"{who} may write in {directory} (mode {place.mode}), and so may send gradients: "
            f"chmod {mask} {directory}, unless that is meant"
        )
    if abs(costs.clock_skew) > 1:
        found.append(
            f"the clock of the file system is {costs.clock_skew:+.1f} s off; the bridge compares "
            "no clocks"
        )
    return found
