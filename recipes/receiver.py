"""Train backbone and h1 on this job's labels, and h2 and the backbone on a donor's gradients.

    accelerate launch recipes/receiver.py
    accelerate launch --config_file accelerate_configs/cpu_2proc.yaml recipes/receiver.py

and, in another terminal, in either order, the same with ``recipes/donor.py``. Both find each other
in ``--runs_dir``; results lie in ``runs/<run>/receiver``.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, set_seed
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
    receiver_arguments,
    rescaling_arguments,
)
from toolkit.configuration import check_configuration
from toolkit.data import in_memory, to_dtype
from toolkit.flag_types import DefaultsFormatter
from toolkit.metrics import start_tracking
from toolkit.models import OneHead
from toolkit.optimizers import (
    build_optimizer,
    build_scheduler,
    learning_rates,
    parameter_groups,
)
from toolkit.provenance import provenance
from toolkit.silos import load_data
from toolkit.training import (
    banner,
    clean_errors,
    configure_logging,
    describe_accuracies,
    evaluate,
    final_weights,
    save_checkpoint,
    write_results,
)

logger = get_logger(__name__)

OWN_HEAD, DONOR_HEAD = "h1", "h2"


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
    args = parser.parse_args()
    check_arguments(parser, args)
    check_bridge_arguments(parser, args)
    return args


def main() -> None:
    """Train the receiver."""
    args = parse_arguments()
    start_time = time.monotonic()

    # -- accelerator ----------------------------------------------------------------------------
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.runs_dir,
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
        model = task.build_model(task.num_classes, seed=args.seed).to(dtype)
        # This job's own loss does not use the donor's head: DDP must not wait for its gradient.
        # FSDP2 never does, but has to know from the first that a teacher may give it one.
        is_sharded = accelerator.distributed_type == DistributedType.FSDP
        teaches_sharded = is_sharded and args.exchange in ("auto", "distill")
        model.heads[DONOR_HEAD].requires_grad_(teaches_sharded)
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
        num_classes = {DONOR_HEAD: task.num_classes[DONOR_HEAD]}
        return OneHead(task.build_model(num_classes, seed=args.seed).to(dtype), DONOR_HEAD)

    receiver = GradientReceiver(
        accelerator,
        model,
        optimizer,
        bridge_config(
            args,
            run=None if checkpoint else args.run,
            resume_from_checkpoint=checkpoint,
            checkpoint_interval=checkpointing_steps,
            checkpoints_kept=args.checkpoints_total_limit,
        ),
        head=f"heads.{DONOR_HEAD}",
        teacher_factory=build_teacher if teaches_sharded else None,  # FSDP2's parts have no copies
    )
    output_dir = args.output_dir or receiver.output_dir
    start_tracking(accelerator, output_dir, vars(args), ["accuracy/h1 (%)", "accuracy/h2 (%)"])
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
        return evaluate(
            accelerator,
            model,
            task.evaluation,
            [OWN_HEAD, DONOR_HEAD],
            args.per_device_eval_batch_size,
        )

    with receiver, logging_redirect_tqdm():
        while receiver.completed_steps < max_train_steps:
            epoch, window = divmod(receiver.completed_windows, steps_per_epoch)
            dataloader.set_epoch(epoch)
            skipped = window * args.gradient_accumulation_steps
            batches = accelerator.skip_first_batches(dataloader, skipped) if skipped else dataloader
            for inputs, labels in batches:
                with accelerator.accumulate(model):
                    taught = [DONOR_HEAD] if receiver.taught_heads else []  # with a teacher
                    inputs = to_dtype(inputs, dtype)
                    outputs = model(inputs, [OWN_HEAD, *taught])
                    # FSDP2 in mixed precision gives half precision.
                    logits = {head: output.to(dtype) for head, output in outputs.items()}
                    loss = F.cross_entropy(logits[OWN_HEAD], labels, reduction=args.loss_reduction)
                    if taught:
                        loss = loss + receiver.teacher_loss(logits[DONOR_HEAD], inputs)
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
                    accuracies = measure()
                    metrics |= {f"accuracy/{head} (%)": a for head, a in accuracies.items()}
                accelerator.log(metrics, step=step)
                progress.update()
                if checkpointing_steps and step % checkpointing_steps == 0:
                    save_checkpoint(accelerator, output_dir, step, args.checkpoints_total_limit)
                if step == max_train_steps:
                    break

    # -- results --------------------------------------------------------------------------------
    progress.close()
    accuracies = measure()
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
        "provenance": {**provenance(accelerator, args), **receiver.evidence(state)},
    }
    write_results(output_dir, results, state)
    logger.info(f"accuracy: {describe_accuracies(accuracies)}")
    logger.info(f"steps alone: {receiver.steps_alone}, with a teacher: {receiver.steps_taught}")
    for donor, fates in receiver.fates_by_donor().items():
        counts = ", ".join(f"{count} {fate}" for fate, count in fates.items())
        logger.info(f"payloads of the {donor}: {counts}")
    logger.info(f"results: {output_dir}; curves: tensorboard --logdir {receiver.run_dir.parent}")
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    with clean_errors():
        main()
