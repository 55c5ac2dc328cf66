"""Ranks save a checkpoint, which the disk of one of them refuses so many times.

accelerate launch tests/jobs/checkpoint_job.py DIRECTORY RANK TIMES
"""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from unittest import mock

from accelerate import Accelerator

from toolkit import patience
from toolkit.bridge.errors import BridgeError
from toolkit.checkpoints import CompletedSteps, save_checkpoint


def main(directory: Path, refused_rank: int, times: int) -> None:
    """Save, and leave in DIRECTORY what this rank has seen."""
    accelerator, steps = Accelerator(cpu=True), CompletedSteps()
    accelerator.register_for_checkpointing(steps)
    steps.value, rank, calls, message = 5, accelerator.process_index, 0, ""
    save = accelerator.save_state

    def save_state(output_dir: str) -> None:
        nonlocal calls
        calls += 1
        if rank == refused_rank and calls <= times:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(output_dir)

    patience.RETRY_SECONDS, patience.PATIENCE_SECONDS = 0.05, 0.1
    with mock.patch.object(accelerator, "save_state", save_state):
        try:
            save_checkpoint(accelerator, directory, 5, None)
        except BridgeError as error:
            message = str(error)
    seen = [accelerator.num_processes, calls, message]
    (directory / f"rank-{rank}.json").write_text(json.dumps(seen))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
