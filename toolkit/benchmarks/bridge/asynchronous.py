"""Exchanges in which no job waits for the other: what is left of the bridge in their steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.benchmarks.bridge.figures import Cell, Figures
from toolkit.benchmarks.bridge.rounds import measure_pair, settings_of

EXCHANGES: Mapping[str, Mapping[str, Any]] = {
    "late gradients": {"exchange": "gradient", "max_staleness": 4},
    "teacher": {"exchange": "distill", "publish_every": 4},
}


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
    for name, config in EXCHANGES.items():
        for batch_size in batch_sizes:
            for role in ("receiver", "donor"):
                settings = settings_of(root, "asynchronous", size, batch_size, repeats, config)
                sides = {
                    side: dataclasses.replace(settings, computes=side == role)
                    for side in ("donor", "receiver")
                }
                means = getattr(measure_pair(sides), role).means
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
