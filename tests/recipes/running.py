"""Launching recipes as a user does, in a directory of their own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tests.launching import Job, Launcher

DONOR, RECEIVER, JOINT = "recipes/donor.py", "recipes/receiver.py", "recipes/joint.py"
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 200.0  # seconds, for a hang only


class Recipes:
    """Launches recipes by their bare names in a directory of their own."""

    def __init__(self, launcher: Launcher, cwd: Path) -> None:
        self._launcher, self.cwd = launcher, cwd

    def __call__(self, recipe: str, *flags: object, num_processes: int = 1) -> Job:
        common = ["--dtype", "float64", "--eval_steps", "1000"]
        return self._launcher(
            ROOT / recipe, *common, *flags, num_processes=num_processes, cwd=self.cwd
        )

    def path(self, *parts: str) -> Path:
        return self.cwd.joinpath("runs", *parts)

    def weights(self, *parts: str) -> dict[str, Tensor]:
        return load_file(self.path(*parts, "model.safetensors"))

    def results(self, *parts: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.path(*parts, "results.json").read_bytes())
        return content


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Poll for something that a living job will bring about."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.02)
