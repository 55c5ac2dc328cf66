"""What a step with the bridge costs: over one without, and over moving the same bytes by hand."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from toolkit.benchmarks.bridge import job
from toolkit.launching import follow, launch, new_directory, terminable

JOB = Path(job.__file__)
BLOCK = 6  # rounds of one kind before the next one's turn


@dataclasses.dataclass(frozen=True, slots=True)
class Side:
    """What one job has measured.

    Attributes:
        num_bytes: that cross each way in a round.
        seconds: of a round, by kind: ``bridge``, ``raw``, ``plain``, and ``blocked``; medians.
        means: the same, means: where not every round exchanges something.
        tails: the same, 99th percentiles.
        marks: as the job has them.
        profile: seconds a round in each function itself, where the job was profiled.
    """

    num_bytes: int
    seconds: Mapping[str, float]
    means: Mapping[str, float]
    tails: Mapping[str, float]
    marks: Mapping[int, float]
    profile: Mapping[str, float]


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """What both jobs have measured."""

    receiver: Side
    donor: Side

    @property
    def plain(self) -> float:
        """Seconds of a step without the bridge, of the slower job."""
        return max(self.receiver.seconds["plain"], self.donor.seconds["plain"])

    @property
    def added(self) -> float:
        """Seconds that the bridge adds to a step in lockstep."""
        return self.receiver.seconds["bridge"] - self.plain

    def latencies(self) -> list[float]:
        """Seconds from the donor's having a gradient to the receiver's having it injected."""
        donor, receiver = self.donor.marks, self.receiver.marks
        return [receiver[step] - donor[step] for step in receiver.keys() & donor.keys()]


def settings_of(
    root: Path, name: str, size: float, batch_size: int, repeats: int, config: Mapping[str, Any]
) -> job.Settings:
    """What a pair is to do, in a new directory.

    Args:
        root: on the disk that is measured.
        name: of the directory.
        size: millions of parameters.
        batch_size: samples of a step, which make it long or short.
        repeats: rounds of each kind, about.
        config: of the bridge, but for where the run is.
    """
    return job.Settings(
        runs_dir=str(new_directory(root, name)),
        num_parameters=round(size * 1e6),
        batch_size=batch_size,
        block=BLOCK,
        num_blocks=max(1, round(repeats / BLOCK)),
        config={"run": "measured", **config},
    )


def measure_pair(settings: Mapping[str, job.Settings], num_processes: int = 1) -> Pair:
    """Launch both jobs and wait for their end.

    Args:
        settings: by role; of one directory.
        num_processes: ranks of the receiver.

    Raises:
        JobFailedError: if one fails.
    """
    with terminable(), Progress(transient=True) as progress:
        jobs = []
        for role, mine in settings.items():
            root = Path(mine.runs_dir)
            flags = (role, json.dumps(dataclasses.asdict(mine)))
            ranks = num_processes if role == "receiver" else 1
            jobs.append(launch(JOB, role, root / role, flags, ranks))
        follow(jobs, progress)
    return Pair(_read(root / "receiver.json"), _read(root / "donor.json"))


def _read(path: Path) -> Side:
    content: dict[str, Any] = json.loads(path.read_bytes())
    found = content["seconds"]
    medians = {kind: statistics.median(seconds) for kind, seconds in found.items()}
    means = {kind: statistics.fmean(seconds) for kind, seconds in found.items()}
    tails = {kind: tail(seconds) for kind, seconds in found.items()}
    marks = {int(step): mark for step, mark in content["marks"].items()}
    return Side(content["num_bytes"], medians, means, tails, marks, content["profile"])


def tail(seconds: Sequence[float]) -> float:
    """The 99th percentile: of fewer than a hundred, the largest."""
    return sorted(seconds)[int(0.99 * len(seconds))]
