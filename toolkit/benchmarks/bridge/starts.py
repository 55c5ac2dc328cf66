"""How long fresh interpreters take to import the package, and to answer ``--help``."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from rich.progress import Progress

from toolkit.benchmarks.bridge.figures import Cell, Figures
from toolkit.benchmarks.timing import interleaved_medians
from toolkit.launching import bundled, terminable

_RECIPES = ("receiver", "donor", "joint")


def commands() -> dict[str, list[str]]:
    """What is started, by what it is called; the first one is what the others are compared with."""
    code = {
        "import torch, accelerate": "import torch, accelerate",
        "import toolkit": "import toolkit",
        "from toolkit import (donor, receiver)": "from toolkit import GradientDonor, "
        "GradientReceiver, BridgeConfig",
    }
    found = {title: ["-c", words] for title, words in code.items()}
    found["gradient-bridge --help"] = ["-m", "toolkit.cli", "--help"]
    for recipe in _RECIPES:
        found[f"{recipe}.py --help"] = [str(bundled("recipes") / f"{recipe}.py"), "--help"]
    return found


def measure_starts(repeats: int) -> Figures:
    """Start each of them in turn.

    Args:
        repeats: of each.
    """
    started = commands()
    with terminable(), Progress(transient=True) as progress:
        task = progress.add_task("starts", total=None)

        def start(arguments: list[str]) -> None:
            subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
            progress.advance(task)

        steps = [partial(start, arguments) for arguments in started.values()]
        medians = dict(zip(started, interleaved_medians(steps, repeats), strict=True))
    base, *_ = medians.values()
    rows: list[dict[str, Cell]] = []
    for title, seconds in medians.items():
        row: dict[str, Cell] = {"fresh interpreter": title}
        if title == "gradient-bridge --help":
            row["command, s"] = seconds
        else:
            row["s"] = seconds
        if "import" in title:
            row["/ torch"] = seconds / base
        rows.append(row)
    return Figures("Time to start", rows, goals={"/ torch": 1.1, "command, s": 0.5})
