"""``recipes/benchmark.py bridge``: all parts of the measurement, and its report."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from toolkit.benchmarks.bridge.asynchronous import measure_asynchronous, measure_profile
from toolkit.benchmarks.bridge.figures import Figures, plot
from toolkit.benchmarks.bridge.growth import (
    NUM_DONORS,
    NUM_FILES,
    NUM_RANKS,
    measure_donors,
    measure_files,
    measure_ranks,
)
from toolkit.benchmarks.bridge.lockstep import measure_lockstep, measure_step_lengths
from toolkit.benchmarks.bridge.peers import measure_peers
from toolkit.benchmarks.bridge.starts import measure_starts
from toolkit.benchmarks.bridge.transport import measure_transport
from toolkit.benchmarks.exchanges.plot import NEEDED, can_plot
from toolkit.benchmarks.timing import write_figures
from toolkit.launching import new_directory

MEMORY = Path("/dev/shm")
# Millions of parameters; some ways of the peers take a minute for four times as many.
LARGEST_OF_PEERS = LARGEST_OF_STEPS = 25.0
MOST_STARTS = 9  # of an interpreter, which takes seconds

Part = Callable[[argparse.Namespace, Path], Figures]

PARTS: dict[str, Part] = {
    "rounds": lambda args, root: measure_lockstep(root, args.sizes, args.repeats),
    "steps": lambda args, root: measure_step_lengths(
        root, _size_of_steps(args), args.batch_sizes, args.repeats
    ),
    "asynchronous": lambda args, root: measure_asynchronous(
        root, _size_of_steps(args), args.batch_sizes, args.repeats
    ),
    "profile": lambda args, root: measure_profile(
        root, _size_of_steps(args), args.batch_sizes[-1], args.repeats
    ),
    "transport": lambda args, root: _measure_transport(args, root),
    "peers": lambda args, root: measure_peers(
        root, [size for size in args.sizes if size <= LARGEST_OF_PEERS], args.repeats
    ),
    "donors": lambda args, root: measure_donors(root, NUM_DONORS, args.repeats),
    "files": lambda args, root: measure_files(root, NUM_FILES, args.repeats),
    "ranks": lambda args, root: measure_ranks(root, args.sizes[:2], NUM_RANKS, args.repeats),
    "starts": lambda args, root: measure_starts(min(args.repeats, MOST_STARTS)),
}


def _size_of_steps(args: argparse.Namespace) -> float:
    """The largest size that steps of every length are measured with."""
    return max((s for s in args.sizes if s <= LARGEST_OF_STEPS), default=min(args.sizes))


def _measure_transport(args: argparse.Namespace, root: Path) -> Figures:
    disk = new_directory(root, "transport")
    with _in_memory() as memory:
        roots = {"disk": disk} | ({"memory": memory} if memory else {})
        return measure_transport(roots, args.sizes, args.repeats)


@contextmanager
def _in_memory() -> Iterator[Path | None]:
    """A directory on a memory file system, where there is one."""
    if not MEMORY.is_dir():
        yield None
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        yield Path(directory)


def measure_bridge(args: argparse.Namespace) -> None:
    """Measure the parts that ``args`` asks for; print tables, write JSON and a picture."""
    if args.plot is not None and not can_plot():
        sys.exit(f"error: {NEEDED}")
    console = Console()
    root = new_directory(args.runs_dir, "bridge")
    console.print(f"logs and files in {root}")
    found = {}
    for name in args.parts:
        console.print(f"measuring {name}", style="dim")
        found[name] = PARTS[name](args, root)
        console.print(found[name].table())
    if args.plot is not None:
        plot(list(found.values()), f"The bridge on {platform.machine()}", args.plot)
    facts = {
        "benchmark": "bridge",
        "num_cpus": os.cpu_count(),
        "machine": platform.platform(),
        "torch": torch.__version__,
        "repeats": args.repeats,
    }
    write_figures(facts | {name: part.rows for name, part in found.items()}, args.output)
