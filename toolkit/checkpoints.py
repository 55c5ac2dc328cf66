"""Checkpoints: complete under their name or not there, few, and written to a disk that may fail."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from toolkit.bridge.job import BridgeJob
from toolkit.patience import write_patiently

logger = logging.getLogger(__name__)

_SETTINGS = "settings.json"  # in a checkpoint
_SAVING = ".saving-"  # prefix of a checkpoint that is not complete yet


class CompletedSteps:
    """A counter that travels with checkpoints (``accelerator.register_for_checkpointing``)."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint holds."""
        return {"completed_steps": self.value}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a checkpoint."""
        self.value = state["completed_steps"]


def refuse_other_settings(accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
    """Keep settings in every checkpoint; ``load_state`` raises where the checkpoint has others.

    It does so before it loads anything. A checkpoint that holds none is taken as it is.

    Args:
        accelerator: that saves and loads.
        settings: by the names of their flags, fit for JSON: those that decide whether a checkpoint
            fits.

    Raises:
        ValueError: from ``load_state``, naming both values.
    """

    def keep(models: object, weights: object, directory: str) -> None:
        if accelerator.is_main_process:
            Path(directory, _SETTINGS).write_text(json.dumps(dict(settings)), encoding="utf-8")

    def compare(models: object, directory: str) -> None:
        path = Path(directory, _SETTINGS)
        saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name in settings.keys() & saved.keys():
            if saved[name] != settings[name]:
                raise ValueError(
                    f"{directory} is a checkpoint of --{name} {_as_typed(saved[name])}, and this "
                    f"job has --{name} {_as_typed(settings[name])}: give it the same, or begin anew"
                )

    accelerator.register_save_state_pre_hook(keep)
    accelerator.register_load_state_pre_hook(compare)


def _as_typed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, total_limit: int | None
) -> None:
    """Save ``<output_dir>/step_<step>``, then delete the oldest ones beyond a limit. A collective.

    The name appears when the checkpoint is complete: a job killed meanwhile leaves none of it.

    Args:
        accelerator: saves everything prepared and registered.
        output_dir: of the job.
        step: completed optimizer steps.
        total_limit: checkpoints to keep, this one included; None for all.

    Raises:
        BridgeError: on all ranks, if the disk refuses it for a minute to one of them, saying what
            to do. What is sharded is tried once.
    """
    target = output_dir / f"step_{step}"
    temporary = output_dir / f"{_SAVING}{target.name}"

    def clear() -> None:
        for leftover in output_dir.glob(f"{_SAVING}*"):
            shutil.rmtree(leftover)

    def name() -> None:
        if temporary.exists():  # else an earlier try has done it
            if target.exists():  # saved before the job was resumed from an older one
                shutil.rmtree(target)
            temporary.rename(target)
        if total_limit is not None:
            for old in _checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old)

    def nothing() -> None:
        pass

    def on_any_rank(failed: bool) -> bool:
        flag = torch.tensor(float(failed), device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum") > 0)

    is_main = accelerator.is_main_process
    # Ranks that save shards wait for each other within: one cannot try again by itself.
    is_sharded = accelerator.distributed_type == DistributedType.FSDP
    for write in (
        clear if is_main else nothing,
        lambda: accelerator.save_state(str(temporary)),
        name if is_main else nothing,
    ):
        write_patiently("the checkpoint", target, write, on_any_rank, is_repeatable=not is_sharded)


def leave_checkpoint(
    accelerator: Accelerator,
    job: BridgeJob,
    output_dir: Path,
    step: int,
    total_limit: int | None,
) -> None:
    """Save where a signal has stopped a job, unless at its start, and say how to go on.

    A collective.

    Args:
        accelerator: saves everything prepared and registered.
        job: that was stopped.
        output_dir: of the job.
        step: completed optimizer steps.
        total_limit: checkpoints to keep, this one included; None for all.
    """
    name = signal.Signals(job.stop_signal).name
    if not step:
        return
    if (obstacle := job.obstacle_to_saving) is not None:
        if accelerator.is_main_process:
            logger.warning("%s: no checkpoint of step %d: %s", name, step, obstacle)
        return
    save_checkpoint(accelerator, output_dir, step, total_limit)
    if accelerator.is_main_process:
        path = output_dir / f"step_{step}"
        logger.warning("%s: go on with --resume_from_checkpoint %s", name, path)


def find_checkpoint(resume_from_checkpoint: str, output_dir: Path) -> Path:
    """The checkpoint that ``--resume_from_checkpoint`` names.

    Args:
        resume_from_checkpoint: a path, or ``latest`` for the highest step in ``output_dir``.
        output_dir: of the job.

    Raises:
        ValueError: if there is none, naming those that there are.
    """
    there = _checkpoints(output_dir)
    if resume_from_checkpoint == "latest":
        if not there:
            raise ValueError(
                f"no checkpoint in {output_dir} to resume from: give --output_dir of a job that "
                "had --checkpointing_steps, or the checkpoint's path"
            )
        return there[-1]
    path = Path(resume_from_checkpoint)
    if not path.is_dir():
        names = [checkpoint.name for checkpoint in there]
        raise ValueError(f"{path} is no checkpoint; {output_dir} has {names or 'none'}")
    return path


def _checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, by step."""
    paths = [path for path in output_dir.glob("step_*") if path.name[5:].isdecimal()]
    return sorted(paths, key=lambda path: int(path.name[5:]))
