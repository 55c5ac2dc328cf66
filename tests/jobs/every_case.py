"""Jobs of two ranks that train case after case, and what they leave."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.launching import Launcher

TIMEOUT = 200.0  # seconds, for a hang only


class Named(Protocol):
    """What is trained; its name is that of its files."""

    @property
    def name(self) -> str: ...


AnyCase = TypeVar("AnyCase", bound=Named)


def train_all(train: Callable[[AnyCase], dict[str, Tensor]], cases: Sequence[AnyCase]) -> None:
    """The job: train every case and write ``<output>/<case>-<rank>.safetensors``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    accelerator = Accelerator(cpu=True)
    for case in cases:
        state = train(case)
        save_file(state, args.output / f"{case.name}-{accelerator.process_index}.safetensors")
        accelerator.wait_for_everyone()
    accelerator.end_training()


def launch_all(
    job: str, directory: Path, cases: Sequence[Named]
) -> dict[str, list[dict[str, Tensor]]]:
    """Launch such a job; by case, what both ranks have left."""
    with Launcher(directory) as launcher:
        launcher(job, directory, num_processes=2).wait(TIMEOUT)
    return {
        case.name: [load_file(directory / f"{case.name}-{rank}.safetensors") for rank in (0, 1)]
        for case in cases
    }
