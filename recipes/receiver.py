"""Train backbone and h1 on this job's labels, and h2 and the backbone on donors' gradients.

    accelerate launch recipes/receiver.py
    accelerate launch --config_file accelerate_configs/cpu_2proc.yaml recipes/receiver.py

and, in another terminal, in either order, the same with ``recipes/donor.py``. Both find each other
in ``--runs_dir``; results lie in ``runs/<run>/receiver``.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from datetime import timedelta

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, InitProcessGroupKwargs, set_seed
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from toolkit import GradientReceiver
from toolkit.arguments import check_arguments, data_arguments, training_arguments
from toolkit.bridge.arguments import (
    bridge_arguments,
    bridge_config,
    check_bridge_arguments,
    checkpoint_to_resume,
    rescaling_arguments,
)
from toolkit.bridge.receiver_arguments import receiver_arguments
from toolkit.checkpoints import leave_checkpoint, save_checkpoint
from toolkit.configuration import check_configuration
from toolkit.data import HEADS, in_memory, to_dtype
from toolkit.flag_types import DefaultsFormatter
from toolkit.metrics import closing_line, start_tracking
from toolkit.models import OneHead
from toolkit.optimizers import (
    build_optimizer,
    build_scheduler,
    learning_rates,
    parameter_groups,
)
from toolkit.pictures import record_predictions
from toolkit.provenance import provenance
from toolkit.silos import load_data
from toolkit.training import (
    banner,
    clean_errors,
    configure_logging,
    describe_accuracies,
    evaluate,
    final_weights,
    record_fates,
    write_results,
)

logger = get_logger(__name__)

OWN_HEAD = HEADS[0]


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description="Train a model with the help of a donor job that shares only a directory.",
        parents=[
            data_arguments(),
            training_arguments(),
            bridge_arguments(),
            rescaling_arguments(),
            receiver_arguments(),
        ],
        formatter_class=DefaultsFormatter,
    )
    parser.add_argument_group("donors").add_argument(
        "--donor_heads",
        nargs="+",
        choices=HEADS[1:],
        default=["h2"],
        help="the heads that donors train",
    )
    args = parser.parse_args()
    if len(set(args.donor_heads)) < len(args.donor_heads):
        parser.error(f"--donor_heads names a head twice: {' '.join(args.donor_heads)}")
    check_arguments(parser, args)
    check_bridge_arguments(parser, args, [f"heads.{head}" for head in args.donor_heads])
    return args


def main() -> None:
    """Train the receiver."""
    args = parse_arguments()
    start_time = time.monotonic()
    heads = [OWN_HEAD, *args.donor_heads]

    # -- accelerator ----------------------------------------------------------------------------
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.runs_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=args.rank_timeout))],
    )
    configure_logging(accelerator)
    with clean_errors(ValueError):
        check_configuration(accelerator, may_shard=True, dtype=args.dtype)
    set_seed(args.seed)

    # -- data, model ----------------------------------------------------------------------------
    with clean_errors(ValueError, OSError), accelerator.main_process_first():
        task = load_data(args, OWN_HEAD)
    dtype = getattr(torch, args.dtype)
    with clean_errors(ValueError):
        model = task.build_model(task.classes_of(heads), seed=args.seed).to(dtype)
        # This job's own loss does not use donors' heads: DDP must not wait for their gradients.
        # FSDP2 never does, but has to know from the first that a teacher may give it one.
        is_sharded = accelerator.distributed_type == DistributedType.FSDP
        teaches_sharded = is_sharded and args.exchange in ("auto", "distill")
        for head in args.donor_heads:
            model.heads[head].requires_grad_(teaches_sharded)
        optimizer = build_optimizer(args, parameter_groups(args, model))
    dataloader = DataLoader(
        in_memory(task.train[OWN_HEAD], OWN_HEAD),
        batch_size=args.per_device_train_batch_size,
        shuffle=True,
    )

    # -- prepare --------------------------------------------------------------------------------
    bare_optimizer = optimizer
    model, optimizer, dataloader = accelerator.prepare(model, optimizer, dataloader)
    steps_per_epoch = math.ceil(len(dataloader) / args.gradient_accumulation_steps)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    scheduler = build_scheduler(args, bare_optimizer, max_train_steps)
    accelerator.register_for_checkpointing(scheduler)
    checkpointing_steps = args.checkpointing_steps
    if checkpointing_steps == "epoch":
        checkpointing_steps = steps_per_epoch

    # -- bridge ---------------------------------------------------------------------------------
    checkpoint = checkpoint_to_resume(args, "receiver")

    def build_teacher() -> OneHead:
        (head,) = args.donor_heads
        return OneHead(task.build_model(task.classes_of([head]), seed=args.seed).to(dtype), head)

    receiver = GradientReceiver(
        accelerator,
        model,
        optimizer,
        bridge_config(
            args,
            run=None if checkpoint else args.run,
            resume_from_checkpoint=checkpoint,
            class_names={f"heads.{h}": n for h, n in task.class_names_of(args.donor_heads).items()},
            checkpoint_interval=checkpointing_steps,
            checkpoints_kept=args.checkpoints_total_limit,
        ),
        head=[f"heads.{head}" for head in args.donor_heads],
        # FSDP2's parts have no copies; a factory is of one head.
        teacher_factory=build_teacher if teaches_sharded and len(args.donor_heads) == 1 else None,
    )
    output_dir = args.output_dir or receiver.output_dir
    start_tracking(accelerator, output_dir, vars(args), receiver)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        logger.info(f"resumed from {checkpoint} at receiver step {receiver.completed_steps}")

    # -- train ----------------------------------------------------------------------------------
    facts = {
        "Run": receiver.run_dir,
        "Num examples": len(task.train[OWN_HEAD]),
        "Per-device batch size": args.per_device_train_batch_size,
        "Num processes": accelerator.num_processes,
        "Gradient accumulation steps": args.gradient_accumulation_steps,
        "Total optimization steps": max_train_steps,
    }
    logger.info(banner("Running training", facts))
    progress = tqdm(
        total=max_train_steps,
        initial=receiver.completed_steps,
        desc="receiver",
        disable=not accelerator.is_main_process,
    )

    def measure() -> dict[str, float]:
        return evaluate(accelerator, model, task.evaluation, heads, args.per_device_eval_batch_size)

    with receiver, logging_redirect_tqdm():
        with receiver.interruptible():
            while receiver.completed_steps < max_train_steps and not receiver.stop_signal:
                epoch, window = divmod(receiver.completed_windows, steps_per_epoch)
                dataloader.set_epoch(epoch)
                skipped = window * args.gradient_accumulation_steps
                batches = (
                    accelerator.skip_first_batches(dataloader, skipped) if skipped else dataloader
                )
                for inputs, labels in batches:
                    with accelerator.accumulate(model):
                        taught = [name.removeprefix("heads.") for name in receiver.taught_heads]
                        inputs = to_dtype(inputs, dtype)
                        outputs = model(inputs, [OWN_HEAD, *taught])
                        # FSDP2 in mixed precision gives half precision.
                        logits = {head: output.to(dtype) for head, output in outputs.items()}
                        loss = F.cross_entropy(
                            logits[OWN_HEAD], labels, reduction=args.loss_reduction
                        )
                        for head in taught:
                            loss = loss + receiver.teacher_loss(
                                logits[head], inputs, head=f"heads.{head}"
                            )
                        receiver.backward(loss, num_samples=len(labels))
                        receiver.inject()
                        if accelerator.sync_gradients and args.max_grad_norm is not None:
                            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                        optimizer.step()
                        optimizer.zero_grad()
                        stepped = receiver.commit()
                    if not stepped:
                        continue
                    step = receiver.completed_steps
                    metrics = receiver.metrics | learning_rates(scheduler)
                    scheduler.step()
                    if step % args.eval_steps == 0 or step == max_train_steps:
                        metrics |= {f"accuracy/{head} (%)": a for head, a in measure().items()}
                    accelerator.log(metrics, step=step)
                    progress.update()
                    if checkpointing_steps and step % checkpointing_steps == 0:
                        save_checkpoint(accelerator, output_dir, step, args.checkpoints_total_limit)
                    if step == max_train_steps or receiver.stop_signal:
                        break
        if receiver.stop_signal:
            limit = args.checkpoints_total_limit
            leave_checkpoint(accelerator, receiver, output_dir, receiver.completed_steps, limit)

    # -- results --------------------------------------------------------------------------------
    progress.close()
    if receiver.stop_signal:
        accelerator.end_training()
        sys.exit(128 + receiver.stop_signal)
    accuracies = measure()
    record_predictions(accelerator, model, task, heads, receiver.completed_steps)
    state = final_weights(accelerator, model)
    results = {
        "recipe": "receiver",
        "accuracies (%)": accuracies,
        "completed_steps": receiver.completed_steps,
        "steps_alone": receiver.steps_alone,
        "steps_taught": receiver.steps_taught,
        "num_processes": accelerator.num_processes,
        "seconds": time.monotonic() - start_time,
        **receiver.traffic(),
        "mean_staleness (receiver steps)": receiver.mean_staleness,
        "fates": receiver.fates(),
        "fates_by_donor": receiver.fates_by_donor(),
        "alarms": receiver.alarms(),
        "provenance": {**provenance(accelerator, args), **receiver.evidence(state)},
    }
    write_results(output_dir, results, state)
    logger.info(f"accuracy: {describe_accuracies(accuracies)}")
    logger.info(f"steps alone: {receiver.steps_alone}, with a teacher: {receiver.steps_taught}")
    record_fates(accelerator, results["fates_by_donor"], receiver.completed_steps)
    logger.info(closing_line(accelerator, output_dir, receiver.run_dir.parent))
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    with clean_errors():
        main()
