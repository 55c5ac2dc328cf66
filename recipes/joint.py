"""Joint training in one job: what a donor and a receiver together are to equal.

    accelerate launch recipes/joint.py
    accelerate launch recipes/joint.py --task overlap --rescale pool

Every optimizer step takes the samples that the receiver's step and the donor's step would have
taken, sums the losses of h1 over the first and of h2 over the second, and weighs the two sums as
``--rescale``, ``--donor_weight`` and ``--loss_reduction`` say. The flags for both jobs' batch
sizes, accumulation and ranks repeat any pair of runs here, on however many ranks this job has.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from toolkit.arguments import check_arguments, data_arguments, training_arguments
from toolkit.bridge.arguments import rescaling_arguments
from toolkit.bridge.rescaling import check_rule, rescale_factors
from toolkit.data import in_memory, window_indices, windows_per_epoch
from toolkit.flag_types import DefaultsFormatter, positive_int
from toolkit.metrics import start_tracking
from toolkit.models import build_model
from toolkit.silos import load_data
from toolkit.training import (
    CompletedSteps,
    banner,
    build_optimizer,
    build_scheduler,
    clean_errors,
    configure_logging,
    describe_accuracies,
    evaluate,
    find_checkpoint,
    output_directory,
    save_checkpoint,
    write_results,
)

logger = get_logger(__name__)

OWN_HEAD, DONOR_HEAD = HEADS = ("h1", "h2")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line and end with a message where it makes no sense."""
    parser = argparse.ArgumentParser(
        description="Train both heads in one job, as a donor and a receiver would together.",
        parents=[data_arguments(), training_arguments(), rescaling_arguments()],
        formatter_class=DefaultsFormatter,
    )
    group = parser.add_argument_group(
        "the two jobs",
        "The receiver's batch size and accumulation are --per_device_train_batch_size and "
        "--gradient_accumulation_steps; its data are --dataset_name and so on.",
    )
    add = group.add_argument
    add("--receiver_processes", type=positive_int, default=1, help="the receiver's ranks")
    add("--donor_processes", type=positive_int, default=1, help="the donor's ranks")
    add("--donor_batch_size", type=positive_int, default=32, help="per rank and micro-step")
    add("--donor_accumulation_steps", type=positive_int, default=1, help="the donor's micro-steps")
    add("--donor_dataset_name", help="the donor's images and labels, beside --dataset_name")
    add("--donor_dataset_config_name", help="configuration of the donor's data set")
    add("--donor_image_column", default="image", help="the donor's images")
    add("--donor_label_column", default="label", help="the donor's class numbers")
    args = parser.parse_args()
    check_arguments(parser, args)
    if (args.dataset_name is None) != (args.donor_dataset_name is None):
        parser.error("give both --dataset_name (labels for h1) and --donor_dataset_name (h2)")
    if args.resume_from_checkpoint == "latest" and args.output_dir is None:
        parser.error("--resume_from_checkpoint latest needs the --output_dir of the earlier job")
    try:
        check_rule(args.rescale, args.loss_reduction)
    except ValueError as error:
        parser.error(str(error))
    return args


def joint_windows(
    args: argparse.Namespace, num_own: int, num_donor: int
) -> tuple[Iterator[tuple[list[int], list[int]]], int]:
    """For every optimizer step, the receiver's and the donor's samples; and the steps per epoch.

    Args:
        args: with both jobs' sizes.
        num_own: rows of the receiver's data.
        num_donor: rows of the donor's data.

    Returns:
        Pairs of lists of row numbers, without end; and how many of them are one epoch of the
        receiver.
    """
    receiver = (
        num_own,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.receiver_processes,
    )
    donor = (
        num_donor,
        args.donor_batch_size,
        args.donor_accumulation_steps,
        args.donor_processes,
    )
    own_windows = window_indices(*receiver, seed=args.seed)
    donor_windows = window_indices(*donor, seed=args.seed)
    return zip(own_windows, donor_windows, strict=True), windows_per_epoch(*receiver)


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over samples of the cross-entropy of logits (N, K) and labels (N,); 0 if N is 0."""
    return F.cross_entropy(logits, labels.to(logits.device), reduction="sum")


def main() -> None:
    """Train both heads."""
    args = parse_arguments()
    start_time = time.monotonic()

    # -- accelerator ----------------------------------------------------------------------------
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir="runs",
    )
    configure_logging(accelerator)
    set_seed(args.seed)
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    output_dir = output_directory(args, "joint")

    # -- data, model ----------------------------------------------------------------------------
    with clean_errors(ValueError, OSError), accelerator.main_process_first():
        task = load_data(args, OWN_HEAD, DONOR_HEAD)
    own_data, donor_data = (in_memory(task.train[head], head) for head in HEADS)
    windows, steps_per_epoch = joint_windows(args, len(own_data), len(donor_data))
    dtype = getattr(torch, args.dtype)
    model = build_model(task.image_shape, task.num_classes, seed=args.seed).to(dtype)
    optimizer = build_optimizer(args, model.parameters())

    # -- prepare --------------------------------------------------------------------------------
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    scheduler = build_scheduler(args, optimizer, max_train_steps)
    completed = CompletedSteps()
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(scheduler, completed)
    checkpointing_steps = args.checkpointing_steps
    if checkpointing_steps == "epoch":
        checkpointing_steps = steps_per_epoch
    start_tracking(accelerator, output_dir, vars(args), [f"accuracy/{head} (%)" for head in HEADS])
    if args.resume_from_checkpoint is not None:
        checkpoint = find_checkpoint(args.resume_from_checkpoint, output_dir)
        accelerator.load_state(str(checkpoint))
        logger.info(f"resumed from {checkpoint} at step {completed.value}")

    # -- train ----------------------------------------------------------------------------------
    facts = {
        "Num examples with labels for h1": len(own_data),
        "Num examples with labels for h2": len(donor_data),
        "Num processes": num_processes,
        "Total optimization steps": max_train_steps,
    }
    logger.info(banner("Running training", facts))
    progress = tqdm(
        total=max_train_steps,
        initial=completed.value,
        desc="joint",
        disable=not accelerator.is_main_process,
    )

    def measure() -> dict[str, float]:
        return evaluate(accelerator, model, task.evaluation, HEADS, args.per_device_eval_batch_size)

    for own, donor in islice(windows, completed.value, max_train_steps):
        # This rank's share of the samples of both jobs; either may be empty.
        own_images, own_labels = own_data[own[rank::num_processes]]
        donor_images, donor_labels = donor_data[donor[rank::num_processes]]
        images = torch.cat([own_images, donor_images]).to(accelerator.device, dtype)
        logits = model(images, HEADS)
        own_loss = summed_loss(logits[OWN_HEAD][: len(own_labels)], own_labels)
        donor_loss = summed_loss(logits[DONOR_HEAD][len(own_labels) :], donor_labels)
        own_factor, donor_factor = rescale_factors(
            args.rescale, args.loss_reduction, len(own), len(donor), args.donor_weight
        )
        # Times the ranks, because DistributedDataParallel takes the mean over them.
        loss = (own_factor * own_loss + donor_factor * donor_loss) * num_processes
        accelerator.backward(loss)
        if args.max_grad_norm is not None:
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        completed.value += 1
        metrics = {"train/learning rate": scheduler.get_last_lr()[0]}
        if not accelerator.optimizer_step_was_skipped:
            scheduler.step()
        if accelerator.log_with:
            sums = torch.stack([own_loss.detach(), donor_loss.detach()])
            own_sum, donor_sum = accelerator.reduce(sums, reduction="sum").tolist()
            metrics["loss/own (per sample)"] = own_sum / len(own)
            metrics["loss/donor (per sample)"] = donor_sum / len(donor)
        if completed.value % args.eval_steps == 0 or completed.value == max_train_steps:
            metrics |= {f"accuracy/{head} (%)": value for head, value in measure().items()}
        accelerator.log(metrics, step=completed.value)
        progress.update()
        if checkpointing_steps and completed.value % checkpointing_steps == 0:
            save_checkpoint(accelerator, output_dir, completed.value, args.checkpoints_total_limit)

    # -- results --------------------------------------------------------------------------------
    progress.close()
    accuracies = measure()
    results = {
        "recipe": "joint",
        "accuracies (%)": accuracies,
        "completed_steps": completed.value,
        "num_processes": num_processes,
        "seconds": time.monotonic() - start_time,
    }
    write_results(output_dir, results, accelerator.get_state_dict(model))
    logger.info(f"accuracy: {describe_accuracies(accuracies)}")
    logger.info(f"results: {output_dir}; curves: tensorboard --logdir {output_dir}")
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    with clean_errors():
        main()
