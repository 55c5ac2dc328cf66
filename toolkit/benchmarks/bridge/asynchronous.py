"""Exchanges in which no job waits for the other: what is left of the bridge in their steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.benchmarks.bridge.figures import Cell, Figures
from toolkit.benchmarks.bridge.job import Settings
from toolkit.benchmarks.bridge.rounds import Side, measure_pair, settings_of
from toolkit.bridge.config import Role

ROLES: tuple[Role, ...] = ("receiver", "donor")
NUM_FUNCTIONS = 8  # of a profile
EXCHANGES: Mapping[str, Mapping[str, Any]] = {
    "late gradients": {"exchange": "gradient", "max_staleness": 4},
    "teacher": {"exchange": "distill", "publish_every": 4},
}


def measure_profile(root: Path, size: float, batch_size: int, repeats: int) -> Figures:
    """Where the time goes that a step with late gradients is blocked for.

    Args:
        root: on the disk that is measured.
        size: millions of parameters.
        batch_size: samples of a step.
        repeats: rounds, about.
    """
    rows: list[dict[str, Cell]] = []
    for role in ROLES:
        side = _measure(root, "late gradients", size, batch_size, repeats, role, profiles=True)
        total = sum(side.profile.values())
        largest = sorted(side.profile.items(), key=lambda item: -item[1])[:NUM_FUNCTIONS]
        for name, seconds in (*largest, ("all", total)):
            rows.append({"job": role, "function": name, "ms a step": 1e3 * seconds})
    return Figures(f"The bridge's part of a step, {size:g} M parameters, late gradients", rows)


def measure_asynchronous(
    root: Path, size: float, batch_sizes: Sequence[int], repeats: int
) -> Figures:
    """Steps of each job while the other one stands for a job on another machine.

    Args:
        root: on the disk that is measured.
        size: millions of parameters.
        batch_sizes: samples of a step, which make it long or short.
        repeats: rounds of each kind, about.
    """
    rows: list[dict[str, Cell]] = []
    for name in EXCHANGES:
        for batch_size in batch_sizes:
            for role in ROLES:
                means = _measure(root, name, size, batch_size, repeats, role).means
                rows.append(
                    {
                        "exchange": name,
                        "job": role,
                        "batch": batch_size,
                        "plain s": means["plain"],
                        "step / plain": means["bridge"] / means["plain"],
                        "blocked %": 100 * means["blocked"] / means["bridge"],
                    }
                )
    return Figures(
        f"Steps of exchanges that do not wait, {size:g} M parameters, over plain ones",
        rows,
        goals={"step / plain": 1.02, "blocked %": 1.0},
        curves=[("plain s", "step / plain", "job"), ("plain s", "blocked %", "job")],
    )


def _measure(
    root: Path,
    exchange: str,
    size: float,
    batch_size: int,
    repeats: int,
    role: Role,
    *,
    profiles: bool = False,
) -> Side:
    """One job, while the other one only waits as long as a step takes."""
    config = EXCHANGES[exchange]
    settings = settings_of(root, "asynchronous", size, batch_size, repeats, config)
    sides: dict[str, Settings] = {
        side: dataclasses.replace(settings, computes=side == role, profiles=profiles)
        for side in ROLES
    }
    pair = measure_pair(sides)
    return pair.receiver if role == "receiver" else pair.donor
