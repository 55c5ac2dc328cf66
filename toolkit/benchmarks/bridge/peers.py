"""The same hand-over by every way that a user would take instead, in one run."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from toolkit.benchmarks.bridge import peer_job
from toolkit.benchmarks.bridge.figures import Cell, Figures
from toolkit.benchmarks.bridge.peer_job import WAYS, PeerSettings
from toolkit.benchmarks.bridge.ways import RawFile, Saved
from toolkit.launching import follow, new_directory, start, terminable

JOB = Path(peer_job.__file__)


def measure_peers(root: Path, sizes: Sequence[float], repeats: int) -> Figures:
    """Hand weights over and a gradient back, between two processes of one compute thread each.

    Args:
        root: on the disk that is measured.
        sizes: millions of parameters.
        repeats: rounds of each way.
    """
    rows: list[dict[str, Cell]] = []
    lacking = {title: lacks for title, way in WAYS.items() if (lacks := way.lacks())}
    ways = [title for title in WAYS if title not in lacking]
    for size in sizes:
        rows += measure_size(new_directory(root, "peers"), size, ways, repeats)
    rows += [{"way": title, "ms": lacks} for title, lacks in lacking.items()]
    return Figures(
        "A round trip of MB each way, and for how long a loop stalls (ms)",
        rows,
        curves=[("MB", "/ raw", "way"), ("MB", "/ seed", "way")],
    )


def measure_size(root: Path, size: float, ways: list[str], repeats: int) -> list[dict[str, Cell]]:
    """The rows of one size.

    Args:
        root: a new directory.
        size: millions of parameters.
        ways: titles; the raw one and the seed's must be among them.
        repeats: rounds of each way.

    Raises:
        JobFailedError: if a process fails; the other one is ended then.
    """
    settings = PeerSettings(
        directory=str(root), num_parameters=round(size * 1e6), ways=ways, repeats=repeats
    )
    flags = json.dumps(dataclasses.asdict(settings))
    with terminable(), Progress(transient=True) as progress:
        sides = ("receiver", "donor")
        command = [sys.executable, str(JOB)]
        follow([start([*command, side, flags], side, root / side) for side in sides], progress)
    receiver, donor = (_read(root / f"{side}.json") for side in sides)
    seconds = {way: statistics.median(receiver["seconds"][way]) for way in ways}
    stalls = {
        way: statistics.mean(statistics.median(side["stalls"][way]) for side in (receiver, donor))
        for way in ways
    }
    return [
        {
            "way": way,
            "MB": receiver["num_bytes"] / 1e6,
            "ms": _milliseconds(seconds[way]),
            "/ raw": seconds[way] / seconds[RawFile.title],
            "stall": _milliseconds(stalls[way]),
            "/ seed": stalls[way] / stalls[Saved.title],
            "durable": WAYS[way].durable,
            "torn": receiver["torn"][way] + donor["torn"][way] if WAYS[way].may_tear else "never",
        }
        for way in ways
    ]


def _milliseconds(seconds: float) -> Cell:
    return round(1e3 * seconds) if seconds >= 0.1 else 1e3 * seconds


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content
