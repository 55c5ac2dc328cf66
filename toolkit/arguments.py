"""Command-line flags that recipes share, as parents for ``argparse.ArgumentParser``.

The names are those of the Hugging Face example scripts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from toolkit.bundled import TASKS
from toolkit.data import HEADS
from toolkit.flag_types import (
    checkpointing_steps,
    non_negative_int,
    positive_float,
    positive_int,
)
from toolkit.optimizers import optimizer_arguments, rate_arguments

# Accelerate's. MLflow refuses names with a unit in parentheses.
_NO_TRACKERS = (LoggerType.ALL, LoggerType.MLFLOW)
TRACKERS = (*sorted(str(kind) for kind in LoggerType if kind not in _NO_TRACKERS), "none")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
_TASK_HELP = {
    "digits": "'digits': h1 tells the digit and has few labels, h2 a pair of digits, h3 whether "
    "it is odd",
    "overlap": "'overlap': two overlaid digits, one for each head",
    "text": "'text': snippets of Python's sources; h1 tells the module and has few labels, h2 the "
    "chapter of the manual; needs transformers",
    "pair": "'pair': two digits side by side and five tasks: both digits, their sum, whether their "
    "product is odd, the share of bright pixels",
}


def data_arguments(tasks: Sequence[str] = TASKS) -> argparse.ArgumentParser:
    """What to learn from: a bundled task, or data of one's own.

    Args:
        tasks: the bundled tasks that the recipe can train.
    """
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--task",
        choices=tasks,
        default="digits",
        help="bundled data; " + "; ".join(_TASK_HELP[task] for task in tasks),
    )
    group.add_argument(
        "--dataset_name",
        help="this job's own images and labels in place of a bundled task: a hub id, a parquet, "
        "arrow, csv or json file, or a directory (save_to_disk, image folder); needs --num_classes",
    )
    group.add_argument(
        "--model_name_or_path",
        help="a pretrained backbone for images in place of the small one, by transformers: a hub "
        "id, or a directory of save_pretrained; the same in both jobs. It may need --dataset_name "
        "and an --image_shape",
    )
    group.add_argument("--dataset_config_name", help="configuration of the data set, if it has any")
    group.add_argument("--dataset_split", default="train", help="rows to train on")
    group.add_argument(
        "--eval_split", help="rows of --dataset_name to evaluate on; without, no evaluation"
    )
    group.add_argument("--image_column", default="image", help="its images")
    group.add_argument("--label_column", default="label", help="its class numbers")
    group.add_argument(
        "--image_shape",
        type=positive_int,
        nargs=3,
        metavar=("C", "H", "W"),
        help="channels (1 or 3), height and width in pixels that images are converted to; must be "
        "the same in both jobs; by default those of the first image",
    )
    group.add_argument(
        "--num_classes",
        type=positive_int,
        nargs="+",
        metavar=("H1", "H2"),
        help="classes of h1, h2 and, if there is one, h3 in data of your own; must be the same in "
        "all jobs",
    )
    return parser


def training_arguments(heads: Sequence[str] = HEADS) -> argparse.ArgumentParser:
    """How to train, what to record and where to write.

    Args:
        heads: that the job can train.
    """
    parents = [step_arguments(), optimizer_arguments("AdamW", 5e-3), rate_arguments(heads)]
    parents.append(output_arguments())
    parser = argparse.ArgumentParser(add_help=False, parents=parents)
    _add_optimization(parser.add_argument_group("optimization and evaluation"))
    return parser


def step_arguments(default_max_train_steps: int = 400) -> argparse.ArgumentParser:
    """How much to train at a time and in all; a part of ``training_arguments()``.

    Args:
        default_max_train_steps: what the recipe does if neither steps nor epochs are given.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("steps").add_argument
    add(
        "--seed",
        type=non_negative_int,
        default=0,
        help="of the initial weights, the split of a bundled task and the order of the samples; "
        "must be the same in jobs that train together",
    )
    add(
        "--per_device_train_batch_size",
        type=positive_int,
        default=32,
        help="samples per rank and micro-step",
    )
    add(
        "--gradient_accumulation_steps",
        type=positive_int,
        default=1,
        help="micro-steps per optimizer step",
    )
    add(
        "--max_train_steps",
        type=positive_int,
        help="optimizer steps; overrides --num_train_epochs; "
        f"{default_max_train_steps} if neither is given",
    )
    add("--num_train_epochs", type=positive_int, help="passes over this job's training data")
    add(
        "--eval_steps",
        type=positive_int,
        default=50,
        help="optimizer steps between evaluations; the last step is always evaluated "
        "(default: %(default)s)",
    )
    return parser


def _add_optimization(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--per_device_eval_batch_size",
        type=positive_int,
        default=256,
        help="samples per rank in evaluation",
    )
    add(
        "--lr_scheduler_type",
        choices=SCHEDULES,
        default="constant",
        help="learning rate over optimizer steps",
    )
    add(
        "--num_warmup_steps",
        type=non_negative_int,
        default=0,
        help="optimizer steps of linear warm-up; not for 'constant'",
    )
    add(
        "--max_grad_norm",
        type=positive_float,
        help="clip the gradient to this norm; no clipping by default",
    )
    add(
        "--loss_reduction",
        choices=("mean", "sum"),
        default="mean",
        help="whether a step follows the mean or the sum of the samples' losses",
    )
    add(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        help="of weights and images; float64 shows exactness",
    )


def output_arguments() -> argparse.ArgumentParser:
    """Precision, and where results, checkpoints and metrics go; a part of training_arguments()."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("output").add_argument
    add(
        "--mixed_precision",
        choices=("no", "bf16", "fp16"),
        help="by default what `accelerate launch` says",
    )
    add(
        "--output_dir",
        type=Path,
        help="for results.json, model.safetensors, checkpoints and TensorBoard files; "
        "by default a new directory, printed at the end",
    )
    add(
        "--checkpointing_steps",
        type=checkpointing_steps,
        metavar="N|epoch",
        help="save a checkpoint every N optimizer steps or at the end of every epoch; "
        "by default never",
    )
    add(
        "--checkpoints_total_limit",
        type=positive_int,
        help="checkpoints to keep, the newest ones; all by default",
    )
    add(
        "--resume_from_checkpoint",
        metavar="PATH|latest",
        help="go on from this checkpoint; 'latest': the newest one of this job's "
        "--output_dir (or run)",
    )
    add(
        "--with_tracking",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="record metrics with --report_to",
    )
    add(
        "--report_to",
        choices=TRACKERS,
        default="tensorboard",
        help="where metrics go: one of Accelerate's trackers whose package is installed",
    )
    return parser


def check_output_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with the parser's error where the flags of ``output_arguments()`` make no sense.

    Args:
        parser: for the error.
        args: what it parsed; ``report_to`` becomes ``none`` without tracking.
    """
    if args.report_to not in ("none", *map(str, get_available_trackers())):
        parser.error(f"--report_to {args.report_to}: its package is not installed")
    if args.checkpoints_total_limit is not None and args.checkpointing_steps is None:
        parser.error("--checkpoints_total_limit needs --checkpointing_steps")
    if not args.with_tracking:
        args.report_to = "none"


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with the parser's error for flags that contradict each other; fill in the last defaults.

    Args:
        parser: had ``data_arguments()`` and ``training_arguments()`` as parents.
        args: what it parsed. ``report_to`` becomes ``none`` without tracking, and
            ``max_train_steps`` gets its default where no epochs are given either.
    """
    if args.dataset_name is not None and args.num_classes is None:
        parser.error("--dataset_name needs --num_classes H1 H2, the same in both jobs")
    if args.num_classes is not None and not 2 <= len(args.num_classes) <= len(HEADS):
        parser.error(f"--num_classes takes 2 to {len(HEADS)} numbers, got {len(args.num_classes)}")
    if args.dataset_name is None:
        own_data = ("dataset_config_name", "dataset_split", "eval_split", "image_column")
        for name in (*own_data, "label_column", "image_shape", "num_classes"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name} is about data of your own: give --dataset_name too")
    if args.image_shape is not None and args.image_shape[0] not in (1, 3):
        parser.error(f"--image_shape starts with 1 or 3 channels, got {args.image_shape[0]}")
    if args.num_warmup_steps and args.lr_scheduler_type == "constant":
        parser.error(
            "--num_warmup_steps needs a schedule: --lr_scheduler_type constant_with_warmup"
        )
    check_output_arguments(parser, args)
    if args.max_train_steps is None and args.num_train_epochs is None:
        args.max_train_steps = 400
