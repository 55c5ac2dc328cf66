"""What recipes need around their training loops: evaluation, messages, results."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor, nn

from toolkit.bridge.errors import BridgeError
from toolkit.data import NO_LABEL, to_dtype
from toolkit.multitask import CLASSES, Kind
from toolkit.parameters import plain_name
from toolkit.patience import write_patiently

logger = logging.getLogger(__name__)


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


def record_fates(
    accelerator: Accelerator, fates_by_donor: Mapping[str, Mapping[str, int]], step: int
) -> None:
    """Log what became of the donors' payloads, and give it to the trackers.

    Args:
        accelerator: with the trackers.
        fates_by_donor: the counts at the end; empty but on the main process.
        step: the receiver's.
    """
    for donor, fates in fates_by_donor.items():
        counts = ", ".join(f"{count} {fate}" for fate, count in fates.items())
        logger.info("payloads of the %s: %s", donor, counts)
        tags = {f"fates/{fate} {donor} (payloads)": n for fate, n in fates.items() if n}
        accelerator.log(tags, step=step)


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
        BridgeError: if the disk refuses them for a minute, saying what to do.
    """
    if not PartialState().is_main_process:
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model_state.items()}
    text = json.dumps(dict(results), indent=2) + "\n"
    temporary = output_dir / f".tmp-{os.getpid()}"

    def write() -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary)
        temporary.chmod(0o666 & ~_umask())  # safetensors lets only the owner read its files
        temporary.replace(output_dir / "model.safetensors")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(output_dir / "results.json")

    write_patiently("the results in", output_dir, write)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
