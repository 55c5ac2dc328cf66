"""Rounds in lockstep: what the bridge adds to a step, by size of the model and length of a step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from toolkit.benchmarks.bridge.figures import Cell, Figures
from toolkit.benchmarks.bridge.job import Settings
from toolkit.benchmarks.bridge.rounds import Pair, measure_pair
from toolkit.launching import new_directory

SMALL_BATCH = 4  # samples of a step that is short
BLOCK = 6  # rounds of one kind before the next one's turn


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
        latencies = sorted(pair.latencies())
        raw = pair.receiver.seconds["raw"]
        rows.append(
            {
                "parameters (M)": size,
                "MB each way": pair.receiver.num_bytes / 1e6,
                "plain step (ms)": 1e3 * pair.plain,
                "raw hand-over (ms)": 1e3 * raw,
                "step (ms)": 1e3 * pair.receiver.seconds["bridge"],
                "added / raw": pair.added / raw,
                "latency p50 / raw": statistics.median(latencies) / (raw / 2),
                "latency p99 / raw": latencies[int(0.99 * len(latencies))] / (raw / 2),
            }
        )
    return Figures(
        "A round in lockstep over handing over the same bytes",
        rows,
        goals={"added / raw": 1.3, "latency p50 / raw": 1.5, "latency p99 / raw": 1.5},
        curves=[("parameters (M)", "added / raw", ""), ("parameters (M)", "step (ms)", "")],
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
                "parameters (M)": size,
                "batch size": batch_size,
                "plain step (s)": pair.plain,
                "step / plain": pair.receiver.seconds["bridge"] / pair.plain,
                "added / raw": pair.added / pair.receiver.seconds["raw"],
            }
        )
    return Figures(
        "A step in lockstep over one without the bridge",
        rows,
        curves=[("plain step (s)", "step / plain", "")],
    )


def _measure(root: Path, size: float, batch_size: int, repeats: int) -> Pair:
    directory = new_directory(root, "lockstep")
    settings = Settings(
        runs_dir=str(directory),
        num_parameters=round(size * 1e6),
        batch_size=batch_size,
        block=BLOCK,
        num_blocks=max(1, round(repeats / BLOCK)),
        config={"run": "measured", "exchange": "gradient"},
    )
    return measure_pair(directory, {"donor": settings, "receiver": settings})
