"""A recipe with a plan's faults in it: ``injected_recipe.py PLAN JOB RECIPE ...``."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from tests.faults.injector import Injector, Plan
from toolkit.bridge import liveness, runs


def run(directory: Path, job: str, recipe: Path, flags: list[str]) -> None:
    """Run a recipe in this process, which is one rank of a job."""
    # A restart need not wait for seconds to see that nobody holds its place.
    for module in (liveness, runs):
        module.BEAT_SECONDS = 0.2  # type: ignore[attr-defined]
    Injector(Plan(directory), job, int(os.environ.get("RANK", "0"))).arm()
    sys.argv = [str(recipe), *flags]
    runpy.run_path(str(recipe), run_name="__main__")


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
