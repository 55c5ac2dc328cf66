"""Give a receiver the gradients of one head and the backbone, from this job's labels.

    accelerate launch recipes/donor.py
    accelerate launch --config_file accelerate_configs/cpu_2proc.yaml recipes/donor.py

and, in another terminal, in either order, the same with ``recipes/receiver.py``. Both find each
other in ``--runs_dir``; results lie in ``runs/<run>/donor``. The donor goes on until the receiver
has ended; ``--max_train_steps`` and ``--num_train_epochs`` are upper bounds.

Several donors of one run have different names, and those of one head a part of its data each:

    accelerate launch recipes/donor.py --donor_name east --shard 0/2
    accelerate launch recipes/donor.py --donor_name west --shard 1/2
    accelerate launch recipes/donor.py --donor_name parity --head h3
    accelerate launch recipes/receiver.py --num_donors 3 --donor_heads h2 h3
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
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from toolkit import GradientDonor
from toolkit.arguments import check_arguments, data_arguments, training_arguments
from toolkit.bridge.arguments import (
    bridge_arguments,
    bridge_config,
    check_bridge_arguments,
    checkpoint_to_resume,
)
from toolkit.bridge.donor_arguments import donor_arguments
from toolkit.checkpoints import leave_checkpoint, save_checkpoint
from toolkit.configuration import check_configuration
from toolkit.data import HEADS, in_memory, take_shard, to_dtype
from toolkit.flag_types import DefaultsFormatter, shard
from toolkit.metrics import closing_line, start_tracking
from toolkit.optimizers import build_optimizer, build_scheduler, parameter_groups
from toolkit.pictures import record_predictions
from toolkit.silos import load_data
from toolkit.training import (
    banner,
    clean_errors,
    configure_logging,
    describe_accuracies,
    evaluate,
    final_weights,
    write_results,
)

logger = get_logger(__name__)


def parse_arguments() -> argparse.Namespace:
    """The command line, checked; ``has_bound`` says whether it bounds the number of steps."""
    parser = argparse.ArgumentParser(
        description="Give gradients to a receiver job that shares only a directory.",
        parents=[
            data_arguments(),
            training_arguments(HEADS[1:]),
            bridge_arguments(),
            donor_arguments(),
        ],
        formatter_class=DefaultsFormatter,
    )
    group = parser.add_argument_group("this donor's part")
    group.add_argument(
        "--head", choices=HEADS[1:], default="h2", help="that this job has labels for"
    )
    group.add_argument(
        "--shard",
        type=shard,
        metavar="INDEX/COUNT",
        help="take one part of the training data only: 0/2 and 1/2 for two donors of one head; by "
        "default all",
    )
    args = parser.parse_args()
    args.has_bound = args.max_train_steps is not None or args.num_train_epochs is not None
    check_arguments(parser, args)
    check_bridge_arguments(parser, args)
    return args


def main() -> None:
    """Train the donor's part."""
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
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=args.rank_timeout))],
    )
    configure_logging(accelerator)
    with clean_errors(ValueError):
        check_configuration(accelerator, may_shard=True, dtype=args.dtype)
    set_seed(args.seed)

    # -- data, model ----------------------------------------------------------------------------
    with clean_errors(ValueError, OSError), accelerator.main_process_first():
        task = load_data(args, args.head)
    dtype = getattr(torch, args.dtype)
    with clean_errors(ValueError):
        model = task.build_model(task.classes_of([args.head]), seed=args.seed).to(dtype)
        silo = task.train[args.head]
        if args.shard is not None:
            silo = take_shard(silo, *args.shard)
        optimizer = build_optimizer(args, parameter_groups(args, model))
    dataloader = DataLoader(
        in_memory(silo, args.head),
        batch_size=args.per_device_train_batch_size,
        shuffle=True,
    )

    # -- prepare --------------------------------------------------------------------------------
    bare_optimizer = optimizer
    model, optimizer, dataloader = accelerator.prepare(model, optimizer, dataloader)
    steps_per_epoch = math.ceil(len(dataloader) / args.gradient_accumulation_steps)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    max_windows = max_train_steps if args.has_bound else None
    scheduler = build_scheduler(args, bare_optimizer, max_train_steps)
    accelerator.register_for_checkpointing(scheduler)
    checkpointing_steps = args.checkpointing_steps
    if checkpointing_steps == "epoch":
        checkpointing_steps = steps_per_epoch

    # -- bridge ---------------------------------------------------------------------------------
    checkpoint = checkpoint_to_resume(args, "donor")
    donor = GradientDonor(
        accelerator,
        model,
        optimizer,
        bridge_config(
            args,
            run=None if checkpoint else args.run,
            resume_from_checkpoint=checkpoint,
            class_names={f"heads.{h}": n for h, n in task.class_names_of([args.head]).items()},
        ),
        head=f"heads.{args.head}",
    )
    output_dir = args.output_dir or donor.output_dir
    start_tracking(accelerator, output_dir, vars(args), donor)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        logger.info(f"resumed from {checkpoint} at window {donor.completed_windows}")

    # -- train ----------------------------------------------------------------------------------
    facts = {
        "Run": donor.run_dir,
        "Num examples": len(silo),
        "Per-device batch size": args.per_device_train_batch_size,
        "Num processes": accelerator.num_processes,
        "Gradient accumulation steps": args.gradient_accumulation_steps,
        "Total optimization steps": max_windows or f"the receiver's; {max_train_steps} if alone",
    }
    logger.info(banner("Running training", facts))
    progress = tqdm(
        total=max_windows,
        initial=donor.completed_windows,
        desc="donor",
        disable=not accelerator.is_main_process,
    )

    def measure() -> dict[str, float]:
        size = args.per_device_eval_batch_size
        accuracies = evaluate(accelerator, model, task.evaluation, [args.head], size)
        tagged = {f"accuracy/{head} (%)": a for head, a in accuracies.items()}
        accelerator.log(tagged, step=donor.weights_step)
        return accuracies

    with donor, logging_redirect_tqdm():
        with donor.interruptible():
            for inputs, labels in donor.follow(dataloader, max_windows):
                with accelerator.accumulate(model):
                    # FSDP2 in mixed precision gives half precision.
                    logits = model(to_dtype(inputs, dtype), [args.head])[args.head].to(dtype)
                    loss = F.cross_entropy(logits, labels, reduction=args.loss_reduction)
                    donor.backward(loss, num_samples=len(labels))
                    if not donor.publish():  # no receiver: an ordinary step
                        if accelerator.sync_gradients and args.max_grad_norm is not None:
                            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                        optimizer.step()
                        if (
                            accelerator.sync_gradients
                            and not accelerator.optimizer_step_was_skipped
                        ):
                            scheduler.step()
                    optimizer.zero_grad()
                if not accelerator.sync_gradients:
                    continue
                step = donor.completed_windows
                if step % args.eval_steps == 0:
                    accuracies = measure()
                    if donor.at_receiver_weights:
                        donor.report({f"{head} (%)": a for head, a in accuracies.items()})
                accelerator.log(donor.metrics, step=donor.receiver_step)
                progress.update()
                if checkpointing_steps and step % checkpointing_steps == 0:
                    save_checkpoint(accelerator, output_dir, step, args.checkpoints_total_limit)
                if donor.windows_alone == max_train_steps:
                    break
        if donor.stop_signal:
            limit = args.checkpoints_total_limit
            leave_checkpoint(accelerator, donor, output_dir, donor.completed_windows, limit)

    # -- results --------------------------------------------------------------------------------
    progress.close()
    if donor.stop_signal:
        accelerator.end_training()
        sys.exit(128 + donor.stop_signal)
    accuracies = measure()
    record_predictions(accelerator, model, task, [args.head], donor.weights_step)
    results = {
        "recipe": "donor",
        "accuracies (%)": accuracies,
        "completed_steps": donor.completed_windows,
        "num_processes": accelerator.num_processes,
        "seconds": time.monotonic() - start_time,
        "published": donor.published_windows,
        "windows_alone": donor.windows_alone,
        **donor.traffic(),
    }
    write_results(output_dir, results, final_weights(accelerator, model))
    logger.info(f"accuracy: {describe_accuracies(accuracies)}")
    logger.info(f"windows: {donor.published_windows} published, {donor.windows_alone} alone")
    if donor.stop_reason:
        logger.info(f"stopped: {donor.stop_reason}")
    logger.info(closing_line(accelerator, output_dir, donor.run_dir.parent))
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    with clean_errors():
        main()
