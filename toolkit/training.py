"""What recipes need around their training loops: evaluation, checkpoints, results."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from toolkit.bridge.errors import BridgeError
from toolkit.bridge.job import BridgeJob
from toolkit.data import NO_LABEL, to_dtype
from toolkit.multitask import CLASSES, Kind
from toolkit.parameters import plain_name

logger = logging.getLogger(__name__)

_SAVING = ".saving-"  # prefix of a checkpoint that is not complete yet
# What torch.save says, by a RuntimeError, where the disk refuses.
_TORCH_SAVE = ("inline_container", "PytorchStreamWriter", "iostream")


def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    dataset: Dataset,
    heads: Sequence[str],
    batch_size: int,
    kinds: Mapping[str, Kind] | None = None,
) -> dict[str, float]:
    """The metric of every head over the samples that have a label for it. A collective.

    Every sample counts once, however many ranks there are, and every rank calls the model equally
    often, as wrappers with collectives of their own need.

    Args:
        accelerator: its ranks share the work.
        model: prepared or not; its training mode is restored.
        dataset: columns ``inputs`` and one per head, with ``NO_LABEL`` where there is none.
        heads: to evaluate.
        batch_size: samples per rank and call.
        kinds: by head, what its metric is; without, the accuracy in percent.

    Returns:
        By head; heads without any label in ``dataset`` are absent.
    """
    kinds = dict.fromkeys(heads, CLASSES) if kinds is None else kinds
    parameter = next(model.parameters())
    # By head: the sums that its metric is made of, at most three, and how many labels there are.
    totals = torch.zeros(len(heads), 4, dtype=torch.float64, device=accelerator.device)
    was_training = model.training
    model.eval()
    for start in range(0, len(dataset), batch_size * accelerator.num_processes):
        stop = min(start + batch_size * accelerator.num_processes, len(dataset))
        mine = list(range(start + accelerator.process_index, stop, accelerator.num_processes))
        # A rank without samples in the last round reads one that it does not count.
        batch = dataset[mine or [start]]
        inputs = to_dtype(batch["inputs"].to(parameter.device), parameter.dtype)
        with torch.no_grad():
            predictions = model(inputs, heads)
        for number, head in enumerate(heads):
            labels = batch[head][: len(mine)].to(parameter.device)
            labelled = labels != NO_LABEL
            sums = kinds[head].sums(predictions[head][: len(mine)][labelled], labels[labelled])
            totals[number, : len(sums)] += sums
            totals[number, -1] += labelled.sum()
    model.train(was_training)
    rows: list[list[float]] = accelerator.reduce(totals, reduction="sum").tolist()
    return {
        head: kinds[head].metric(sums)
        for head, (*sums, num_labels) in zip(heads, rows, strict=True)
        if num_labels
    }


def configure_logging(accelerator: Accelerator) -> None:
    """Log to the terminal: everything from the main process, only warnings from the others."""
    logging.basicConfig(
        level=logging.INFO if accelerator.is_main_process else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )


@contextlib.contextmanager
def clean_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End the process with the message alone where a user, and not the code, can mend an error.

    Interrupted by Ctrl-C, it ends with one line too, and status 130.

    Args:
        kinds: errors to treat so, beside the bridge's.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, (BridgeError, *kinds)):
            raise
        sys.exit(f"error: {error}")


def describe_accuracies(accuracies: Mapping[str, float]) -> str:
    """One line of accuracies by head."""
    return ", ".join(f"{head} {value:.2f} %" for head, value in accuracies.items()) or "no labels"


def banner(title: str, facts: Mapping[str, object]) -> str:
    """The lines that a recipe logs before its loop: ``***** title *****`` and one per fact."""
    return "\n".join([f"***** {title} *****", *(f"  {key} = {facts[key]}" for key in facts)])


def new_output_dir(runs_dir: Path, recipe: str) -> Path:
    """Make ``<runs_dir>/<recipe>-NNNN`` of the next free number, the same on every rank.

    A collective, which needs a ``PartialState`` or an ``Accelerator`` that exists already.
    """
    found: list[Any] = [None]
    if PartialState().is_main_process:
        runs_dir.mkdir(parents=True, exist_ok=True)
        number = 1
        while found[0] is None:
            path = runs_dir / f"{recipe}-{number:04d}"
            number += 1
            try:
                path.mkdir()
            except FileExistsError:
                continue
            found[0] = path
    broadcast_object_list(found)
    result: Path = found[0]
    return result


def output_directory(args: argparse.Namespace, recipe: str) -> Path:
    """Where a recipe writes that belongs to no run of the bridge. A collective.

    Args:
        args: with the flags of ``output_arguments()``.
        recipe: its name.

    Returns:
        The directory asked for, that of the checkpoint to resume from, or a new
        ``runs/<recipe>-NNNN``.
    """
    if args.output_dir is not None:
        return Path(args.output_dir)
    if args.resume_from_checkpoint is not None:
        return Path(args.resume_from_checkpoint).resolve().parent
    return new_output_dir(Path("runs"), recipe)


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
        BridgeError: if the disk refuses it, saying what to do.
    """
    target = output_dir / f"step_{step}"
    temporary = output_dir / f"{_SAVING}{target.name}"
    with _naming_the_disk("the checkpoint", target):
        if accelerator.is_main_process:
            for leftover in output_dir.glob(f"{_SAVING}*"):
                shutil.rmtree(leftover)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if target.exists():  # saved before the job was resumed from an older one
                shutil.rmtree(target)
            temporary.rename(target)
            if total_limit is not None:
                for old in _checkpoints(output_dir)[:-total_limit]:
                    shutil.rmtree(old)
        accelerator.wait_for_everyone()


@contextlib.contextmanager
def _naming_the_disk(what: str, path: Path) -> Iterator[None]:
    """Say in one line what a disk refuses that is full, read-only or broken."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(m in str(error) for m in _TORCH_SAVE):
            raise
        raise BridgeError(
            f"cannot write {what} {path}: {error}. Free some space there, or let this user write "
            "there again, and go on from the newest checkpoint (--resume_from_checkpoint latest)"
        ) from error


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


def final_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """A prepared model's state by plain name, whatever wraps its modules. A collective.

    Where FSDP has sharded the model, the main process alone gets it.
    """
    state = accelerator.get_state_dict(model)
    return {plain_name(name): tensor for name, tensor in state.items()}


def write_results(
    output_dir: Path, results: Mapping[str, Any], model_state: Mapping[str, Tensor]
) -> None:
    """Write ``model.safetensors`` and then ``results.json``, each whole or not at all.

    Only the main process writes.

    Args:
        output_dir: is made if there is none.
        results: fit for JSON.
        model_state: as :func:`final_weights` gives it.

    Raises:
        BridgeError: if the disk refuses them, saying what to do.
    """
    if not PartialState().is_main_process:
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model_state.items()}
    text = json.dumps(dict(results), indent=2) + "\n"
    temporary = output_dir / f".tmp-{os.getpid()}"
    with _naming_the_disk("the results in", output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary)
        temporary.chmod(0o666 & ~_umask())  # safetensors lets only the owner read its files
        temporary.replace(output_dir / "model.safetensors")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(output_dir / "results.json")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
