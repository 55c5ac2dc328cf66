"""What ``gradient-bridge doctor`` reports: the shape of its JSON, and no more than that.

``--json`` prints a :class:`Report` as one object. While ``format`` is 1, fields may be added, but
none goes away or changes its meaning. Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """How long something took, over a number of tries."""

    p50: float
    p99: float
    num_tries: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """The percentiles, by the nearest rank, of one time or more."""
        ordered = sorted(seconds)
        p50, p99 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.99))
        return cls(p50=p50, p99=p99, num_tries=len(ordered))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The file system and the directory.

    Attributes:
        file_system: its type; None if the system does not say.
        mount_point: where it is mounted.
        mount_options: with which it is.
        free_bytes: that this user may use.
        free_inodes: files that may still be made; None if there is no limit.
        max_name_bytes: the length of a file's name, at most.
        mode: permission bits of the directory, octal.
        others_may_write: whether a user who is neither its owner nor of its group may.
        group_may_write: whether its group may.
    """

    file_system: str | None
    mount_point: str | None
    mount_options: list[str]
    free_bytes: int
    free_inodes: int | None
    max_name_bytes: int
    mode: str
    others_may_write: bool
    group_may_write: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Promises:
    """What the bridge needs of a file system, tried by two processes of this host.

    Attributes:
        hard_links: whether a file may have a second name.
        link_never_replaces: of those who link to one new name exactly one succeeds. None if not
            tried.
        create_is_exclusive: the same for O_EXCL.
        mkdir_is_exclusive: the same for a directory.
        rename_is_atomic: a file that is replaced is always there, and whole.
        pread_is_right: a part of a file reads as it was written.
        mmap_is_right: the same for a mapped file.
    """

    hard_links: bool
    link_never_replaces: bool | None
    create_is_exclusive: bool
    mkdir_is_exclusive: bool
    rename_is_atomic: bool
    pread_is_right: bool
    mmap_is_right: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What things cost.

    Attributes:
        fsync_file: of a new file of 4 KiB.
        fsync_directory: of a directory with a new name in it.
        publish: of a whole record of 4 KiB, as the bridge does; None without hard links.
        visibility: from the moment when a name is made until another process on this host, which
            polls as the bridge's readers do, has opened it and said so. None if it never did.
        written_bytes: of the file for the next two.
        write_bytes_per_second: written and synced.
        read_bytes_per_second: after the system was asked to forget them.
        clock_skew: the time that the file system gives a new file, less that of this host.
    """

    fsync_file: Times
    fsync_directory: Times
    publish: Times | None
    visibility: Times | None
    written_bytes: int
    write_bytes_per_second: float
    read_bytes_per_second: float
    clock_skew: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """What follows from the measurements.

    Attributes:
        obstacles: why the bridge cannot be used here, and what to do; none if it can.
        settings: of ``BridgeConfig`` that fit, where the defaults do not.
        reasons: why, and with which flags of the recipes.
        notes: what is good to know.
    """

    obstacles: list[str]
    settings: dict[str, Any]
    reasons: list[str]
    notes: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All that was found out.

    Attributes:
        format: of this object.
        directory: as it was given.
        payload_bytes: that cross at a time, as was said or by default.
        step_seconds: of a training step, as was said or by default.
        exchange_seconds: what one exchange in lockstep adds to a step: weights and a gradient
            are written, seen and read. None if it cannot be done.
        place: see there.
        promises: see there.
        costs: see there.
        advice: see there.
    """

    format: int
    directory: str
    payload_bytes: int
    step_seconds: float
    exchange_seconds: float | None
    place: Place
    promises: Promises
    costs: Costs
    advice: Advice

    @property
    def usable(self) -> bool:
        """Whether the bridge can be used here."""
        return not self.advice.obstacles

    def as_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints: all fields, and ``usable``."""
        return {"usable": self.usable, **dataclasses.asdict(self)}
