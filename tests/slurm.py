"""A cluster of two machines that are this one: what ``accelerate_configs/slurm.sh`` asks Slurm for.

``srun`` starts one task for each machine and tells it its number, ``scontrol`` names the machines.
"""

from __future__ import annotations

import os
import random
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.launching import ROOT, Job, Launcher

SCRIPT = ROOT / "accelerate_configs" / "slurm.sh"
MACHINES = 2


class Cluster:
    """Two machines that run jobs of one rank on each.

    Args:
        directory: for what stands in for Slurm's programs.
        launcher: of the test.
        addresses: of the machines.
        entrances: what begins a command that is to run on a machine; nothing for this one.
    """

    def __init__(
        self,
        directory: Path,
        launcher: Launcher,
        addresses: Sequence[str] = ("127.0.0.1",) * MACHINES,
        entrances: Sequence[Sequence[str]] = ((),) * MACHINES,
    ) -> None:
        self._programs, self._launcher = directory / "slurm", launcher
        self._programs.mkdir()
        self._write("scontrol", *(f"echo {address}" for address in addresses))
        tasks = [
            f'{shlex.join([*entrance, "env", f"SLURM_NODEID={number}"])} "$@" & tasks+=($!)'
            for number, entrance in enumerate(entrances)
        ]
        waits = 'for task in "${tasks[@]}"; do wait "$task" || status=$?; done'
        options = "while [[ $1 == --* ]]; do shift; done"
        self._write("srun", options, "tasks=()", "status=0", *tasks, waits, "exit $status")

    def submit(self, recipe: str, *flags: object, **env: str) -> Job:
        """``sbatch accelerate_configs/slurm.sh recipe flags...``, which starts at once."""
        settings = {
            "PATH": f"{self._programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_JOB_ID": str(free_job_id()),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NNODES": str(MACHINES),
            "SLURM_GPUS_ON_NODE": "1",
            **env,
        }
        command = ["bash", str(SCRIPT), recipe, *map(str, flags)]
        return self._launcher.start(Path(recipe).stem, command, env=settings)

    def _write(self, name: str, *lines: str) -> None:
        path = self._programs / name
        path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
        path.chmod(0o755)


def free_job_id() -> int:
    """A job's number from which the script makes a port that nobody has."""
    while True:
        number = random.randrange(20000)
        with socket.socket() as probe:
            try:
                probe.bind(("", 10000 + number))
            except OSError:
                continue
        return number
