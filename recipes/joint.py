"""Joint training in one job: what a donor and a receiver together are to equal.

    accelerate launch recipes/joint.py
    accelerate launch recipes/joint.py --task overlap --rescale pool
    accelerate launch recipes/joint.py --task pair --method rotograd --learning_rate 1e-3

Every optimizer step takes the samples that the receiver's step and the donor's step would have
taken, sums the losses of h1 over the first and of h2 over the second, and weighs the two sums as
``--rescale``, ``--donor_weight`` and ``--loss_reduction`` say. The flags for both jobs' batch
sizes, accumulation and ranks repeat any pair of runs here, on however many ranks this job has;
``--donors`` repeats those of several donors that are alike.

``--method`` says what becomes of the tasks' gradients where they meet: ``sum`` is what a donor and
a receiver do. ``--task pair`` is one silo whose samples have labels for five tasks.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from toolkit.arguments import check_arguments, data_arguments, training_arguments
from toolkit.bridge.arguments import rescaling_arguments
from toolkit.bridge.config import BridgeConfig
from toolkit.bridge.rescaling import check_rule, rescale_factors
from toolkit.bundled import TASKS
from toolkit.checkpoints import (
    CompletedSteps,
    find_checkpoint,
    refuse_other_settings,
    save_checkpoint,
)
from toolkit.configuration import check_configuration
from toolkit.data import HEADS, shard_windows, to_dtype, window_indices, windows_per_epoch
from toolkit.flag_types import DefaultsFormatter, positive_int
from toolkit.methods import (
    check_method_arguments,
    find_method,
    method_arguments,
    method_groups,
    rotating_model,
)
from toolkit.metrics import closing_line, start_tracking
from toolkit.multitask import CLASSES, PAIR, PAIR_TASKS, digit_pair, one_silo_each
from toolkit.optimizers import build_optimizer, build_scheduler, learning_rates
from toolkit.silos import load_data
from toolkit.task_gradients import ByName, RuleBackward, conflict_metrics
from toolkit.training import (
    banner,
    clean_errors,
    configure_logging,
    evaluate,
    final_weights,
    output_directory,
    write_results,
)

logger = get_logger(__name__)

OF_TWO_JOBS = (
    *("rescale", "donor_weight", "receiver_processes", "donor_processes", "donors"),
    *("donor_batch_size", "donor_accumulation_steps", "lr_head1", "lr_head2", "lr_head3"),
)
OF_CHECKPOINTS = ("task", "donors", "method", "optimizer")  # decide what a checkpoint fits


def parse_arguments() -> argparse.Namespace:
    """Parse the command line and end with a message where it makes no sense."""
    parser = argparse.ArgumentParser(
        description="Train both heads in one job, as a donor and a receiver would together.",
        parents=[
            data_arguments((*TASKS, PAIR)),
            training_arguments(),
            rescaling_arguments(),
            method_arguments(),
        ],
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
    add(
        "--donors",
        nargs="+",
        choices=HEADS[1:],
        default=["h2"],
        metavar="HEAD",
        help="the head of each donor; those of one head have a --shard of its data each",
    )
    add("--donor_dataset_name", help="the donor's images and labels, beside --dataset_name")
    add("--donor_dataset_config_name", help="configuration of the donor's data set")
    add("--donor_image_column", default="image", help="the donor's images")
    add("--donor_label_column", default="label", help="the donor's class numbers")
    args = parser.parse_args()
    check_arguments(parser, args)
    args.heads = list(dict.fromkeys([HEADS[0], *args.donors]))
    check_method_arguments(parser, args, len(PAIR_TASKS if args.task == PAIR else args.heads))
    for name in ("dataset_name", "model_name_or_path", *OF_TWO_JOBS):
        if args.task == PAIR and getattr(args, name) != parser.get_default(name):
            parser.error(
                f"--{name} is about two jobs' data, backbone or heads; --task {PAIR} has others"
            )
    if (args.dataset_name is None) != (args.donor_dataset_name is None):
        parser.error("give both --dataset_name (labels for h1) and --donor_dataset_name (h2)")
    if args.donor_dataset_name is not None and len(args.heads) > 2:
        parser.error("--donor_dataset_name is of one head: give --donors that train the same one")
    for name in ("donor_dataset_config_name", "donor_image_column", "donor_label_column"):
        if args.donor_dataset_name is None and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is about data of your own: give --donor_dataset_name too")
    if args.resume_from_checkpoint == "latest" and args.output_dir is None:
        parser.error("--resume_from_checkpoint latest needs the --output_dir of the earlier job")
    try:
        check_rule(args.rescale, args.loss_reduction)
        weights = BridgeConfig(donor_weight=args.donor_weight)
        of_heads = weights.weights_of([f"heads.{head}" for head in args.heads[1:]])
        args.donor_weights = dict(zip(args.heads[1:], of_heads.values(), strict=True))
    except ValueError as error:
        parser.error(str(error))
    return args


def joint_windows(
    args: argparse.Namespace, num_samples: Sequence[int]
) -> tuple[Iterator[tuple[list[int], ...]], int]:
    """For every optimizer step, the samples for each head; and the steps per epoch.

    Args:
        args: with both jobs' sizes.
        num_samples: rows of the receiver's data, and of those of each head that has donors.

    Returns:
        Row numbers for each head, without end; and how many steps are one epoch of the receiver.
    """
    receiver = (
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.receiver_processes,
    )
    donor = (args.donor_batch_size, args.donor_accumulation_steps, args.donor_processes)
    windows = [window_indices(num_samples[0], *receiver, seed=args.seed)]
    for head, rows in zip(args.heads[1:], num_samples[1:], strict=False):
        windows.append(shard_windows(args.donors.count(head), rows, *donor, seed=args.seed))
    return zip(*windows, strict=True), windows_per_epoch(num_samples[0], *receiver)


def loss_factors(args: argparse.Namespace, num_labels: Sequence[int]) -> Sequence[float]:
    """What the sum of each task's losses is multiplied by.

    Args:
        args: with the rules for it.
        num_labels: for each task, the samples of this step that have a label for it.
    """
    if args.task == PAIR:
        return [1.0 if args.loss_reduction == "sum" else 1.0 / number for number in num_labels]
    number, *of_donors = num_labels
    own, donors = rescale_factors(
        args.rescale,
        args.loss_reduction,
        number,
        dict(zip(args.heads[1:], of_donors, strict=True)),
        args.donor_weights,
    )
    return own, *donors.values()


def main() -> None:
    """Train all heads."""
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
    with clean_errors(ValueError):
        check_configuration(accelerator, dtype=args.dtype)
    set_seed(args.seed)
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    output_dir = output_directory(args, "joint")

    # -- data, model ----------------------------------------------------------------------------
    with clean_errors(ValueError, OSError), accelerator.main_process_first():
        if args.task == PAIR:
            tasks = digit_pair(args.seed)
        else:
            tasks = one_silo_each(load_data(args, *args.heads), args.heads)
    windows, steps_per_epoch = joint_windows(args, [len(silo) for silo in tasks.silos])
    dtype = getattr(torch, args.dtype)
    with clean_errors(ValueError):
        network = tasks.build_model(args.seed)
        rotations = rotating_model(args, network, tasks.silos[0][:1][0])
    if rotations and args.task != PAIR and args.coop_after is None:
        logger.warning(
            "each sample has a label for one head: no two tasks' gradients meet in it, so that no "
            "rotation turns but by rounding"
        )
    model = (rotations or network).to(dtype)
    with clean_errors(ValueError):
        optimizer = build_optimizer(args, method_groups(args, network, rotations))

    # -- prepare --------------------------------------------------------------------------------
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    scheduler = build_scheduler(args, optimizer, max_train_steps)
    completed = CompletedSteps()
    model, optimizer = accelerator.prepare(model, optimizer)
    predict = ByName(model, tasks.names) if rotations else model
    rule = find_method(args.method, len(tasks.names))
    separate = RuleBackward(accelerator, network.backbone, network.heads, rule) if rule else None
    accelerator.register_for_checkpointing(scheduler, completed)
    refuse_other_settings(accelerator, {name: getattr(args, name) for name in OF_CHECKPOINTS})
    checkpointing_steps = args.checkpointing_steps
    if checkpointing_steps == "epoch":
        checkpointing_steps = steps_per_epoch
    start_tracking(accelerator, output_dir, vars(args))
    if args.resume_from_checkpoint is not None:
        with clean_errors(ValueError):
            checkpoint = find_checkpoint(args.resume_from_checkpoint, output_dir)
            accelerator.load_state(str(checkpoint))
        logger.info(f"resumed from {checkpoint} at step {completed.value}")

    # -- train ----------------------------------------------------------------------------------
    facts = {
        f"Num examples with labels for {' '.join(names)}": len(silo)
        for names, silo in zip(tasks.silo_tasks, tasks.silos, strict=True)
    }
    facts |= {"Num processes": num_processes, "Total optimization steps": max_train_steps}
    logger.info(banner("Running training", facts))
    progress = tqdm(
        total=max_train_steps,
        initial=completed.value,
        desc="joint",
        disable=not accelerator.is_main_process,
    )

    def measure() -> dict[str, float]:
        size = args.per_device_eval_batch_size
        return evaluate(accelerator, predict, tasks.evaluation, tasks.names, size, tasks.kinds)

    loss_names = tasks.names
    if args.task != PAIR:  # as a receiver has them, whose tags name its donors
        loss_names = ("own", *(args.heads[1:] if len(args.heads) > 2 else ["donor"]))
    for window in islice(windows, completed.value, max_train_steps):
        # This rank's share of the samples of both jobs; either may be empty.
        batch = tasks.batch(window, rank, num_processes)
        num_labels = tasks.num_labels(window)
        if rotations and args.coop_after is not None:
            rotations.coop(completed.value >= args.coop_after)
        with accelerator.no_sync(model) if separate else contextlib.nullcontext():
            predictions = predict(to_dtype(batch.inputs.to(accelerator.device), dtype), tasks.names)
            sums = tasks.summed_losses(predictions, batch)
            factors = loss_factors(args, num_labels)
            losses = [factor * loss for factor, loss in zip(factors, sums, strict=True)]
            # Times the ranks, because the mean over them is taken.
            if separate:
                separate([loss * num_processes for loss in losses], seed=completed.value)
            elif rotations:
                total = rotations.total([loss * num_processes for loss in losses])
                accelerator.backward(total)
            else:
                accelerator.backward(sum(losses) * num_processes)
        if args.max_grad_norm is not None:
            accelerator.clip_grad_norm_(network.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        completed.value += 1
        metrics = learning_rates(scheduler)
        if not accelerator.optimizer_step_was_skipped:
            scheduler.step()
        if accelerator.log_with:
            reduced = accelerator.reduce(torch.stack(sums).detach(), reduction="sum").tolist()
            for name, value, number in zip(loss_names, reduced, num_labels, strict=True):
                metrics[f"loss/{name} (per sample)"] = value / number
            metrics |= conflict_metrics(rotations or separate, tasks.names)
        if completed.value % args.eval_steps == 0 or completed.value == max_train_steps:
            metrics |= tasks.tagged(measure())
        accelerator.log(metrics, step=completed.value)
        progress.update()
        if checkpointing_steps and completed.value % checkpointing_steps == 0:
            save_checkpoint(accelerator, output_dir, completed.value, args.checkpoints_total_limit)

    # -- results --------------------------------------------------------------------------------
    progress.close()
    found = measure()
    results = {
        "recipe": "joint",
        "accuracies (%)": {name: found[name] for name in found if tasks.kinds[name] is CLASSES},
        "metrics": tasks.tagged(found),
        "completed_steps": completed.value,
        "num_processes": num_processes,
        "seconds": time.monotonic() - start_time,
    }
    write_results(output_dir, results, final_weights(accelerator, model))
    described = [f"{tag} {value:.4g}" for tag, value in tasks.tagged(found).items()]
    logger.info(", ".join(described) or "no labels")
    logger.info(closing_line(accelerator, output_dir))
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    with clean_errors():
        main()
