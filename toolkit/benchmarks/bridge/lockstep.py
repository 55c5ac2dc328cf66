"""Rounds in lockstep: what the bridge adds to a step, by size of the model and length of a step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from toolkit.benchmarks.bridge.figures import Cell, Figures
from toolkit.benchmarks.bridge.rounds import Pair, measure_pair, settings_of, tail

SMALL_BATCH = 4  # samples of a step that is short


def measure_lockstep(root: Path, sizes: Sequence[float], repeats: int) -> Figures:
    """Short steps of models of several sizes.

    Args:
        root: on the disk that is measured.
        sizes: millions of parameters.
        repeats: rounds of each kind, about.
    """
    rows: list[dict[str, Cell]] = []
    for size in sizes:
        pair = _measure(root, size, SMALL_BATCH, repeats)
        latencies = pair.latencies()
        raw, raw_tail = pair.receiver.seconds["raw"], pair.receiver.tails["raw"]
        rows.append(
            {
                "M params": size,
                "MB": pair.receiver.num_bytes / 1e6,
                "plain ms": 1e3 * pair.plain,
                "raw ms": 1e3 * raw,
                "step ms": 1e3 * pair.receiver.seconds["bridge"],
                "added / raw": pair.added / raw,
                "p50 / raw": statistics.median(latencies) / (raw / 2),
                "p99 / raw": tail(latencies) / (raw_tail / 2),
            }
        )
    return Figures(
        "A step in lockstep: what the bridge adds, and the latency of a gradient (p50, p99), "
        "over those of a raw hand-over of the same bytes (MB each way)",
        rows,
        goals={"added / raw": 1.3, "p50 / raw": 1.5, "p99 / raw": 1.5},
        curves=[("M params", "added / raw", ""), ("M params", "step ms", "")],
    )


def measure_step_lengths(
    root: Path, size: float, batch_sizes: Sequence[int], repeats: int
) -> Figures:
    """Steps of several lengths of one model.

    Args:
        root: on the disk that is measured.
        size: millions of parameters.
        batch_sizes: samples of a step, which make it long or short.
        repeats: rounds of each kind, about.
    """
    rows: list[dict[str, Cell]] = []
    for batch_size in batch_sizes:
        pair = _measure(root, size, batch_size, repeats)
        rows.append(
            {
                "M params": size,
                "batch": batch_size,
                "plain s": pair.plain,
                "step / plain": pair.receiver.seconds["bridge"] / pair.plain,
                "added / raw": pair.added / pair.receiver.seconds["raw"],
            }
        )
    return Figures(
        "A step in lockstep over one without the bridge",
        rows,
        curves=[("plain s", "step / plain", "")],
    )


def _measure(root: Path, size: float, batch_size: int, repeats: int) -> Pair:
    settings = settings_of(root, "lockstep", size, batch_size, repeats, {"exchange": "gradient"})
    return measure_pair({"donor": settings, "receiver": settings})
