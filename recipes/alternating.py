"""Two tasks by turns, one model: the layer of the task that waits stays bit by bit as it is.

    accelerate launch recipes/alternating.py
    accelerate launch --config_file accelerate_configs/cpu_2proc.yaml recipes/alternating.py

Scikit-learn's digits are seen in two ways: task 1 sees the 64 pixels, task 2 the sums of the 8 rows
and of the 8 columns. Each has its own ``hidden_task1`` or ``hidden_task2``; both share ``output``.
Every optimizer step is recorded: the table at the end says which layers the steps of each task
changed. What happens without ``toolkit.freezing``:

    accelerate launch recipes/alternating.py --freezing requires_grad --no-set_to_none
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.logging import get_logger
from accelerate.utils import extract_model_from_parallel, gather_object, set_seed
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from toolkit.arguments import check_output_arguments, output_arguments, step_arguments
from toolkit.changes import ChangeRecord
from toolkit.checkpoints import CompletedSteps, find_checkpoint, save_checkpoint
from toolkit.configuration import check_configuration
from toolkit.data import endless_batches
from toolkit.flag_types import DefaultsFormatter, positive_int
from toolkit.freezing import frozen
from toolkit.metrics import closing_line, start_tracking
from toolkit.optimizers import build_optimizer, optimizer_arguments
from toolkit.training import (
    banner,
    clean_errors,
    configure_logging,
    describe_accuracies,
    final_weights,
    output_directory,
    write_results,
)

logger = get_logger(__name__)

MAX_TRAIN_STEPS = 2000
TASKS = (1, 2)
NUM_FEATURES = {1: 64, 2: 16}
NUM_CLASSES, HIDDEN_SIZE = 10, 64
NUM_EVALUATION = 360  # of 1797 digits


def parse_arguments() -> argparse.Namespace:
    """Parse the command line and end with a message where it makes no sense."""
    parser = argparse.ArgumentParser(
        description="Train two tasks by turns; the layer of the one that waits rests bit by bit.",
        parents=[step_arguments(MAX_TRAIN_STEPS), optimizer_arguments("Adam"), output_arguments()],
        formatter_class=DefaultsFormatter,
    )
    parser.set_defaults(eval_steps=200)
    add = parser.add_argument_group("the two tasks").add_argument
    add("--steps_per_task", type=positive_int, default=50, help="optimizer steps of each turn")
    add(
        "--freezing",
        choices=("exact", "requires_grad"),
        default="exact",
        help="how the waiting task's layer is held: by toolkit.freezing, or, as a demonstration, "
        "only by requires_grad_(False)",
    )
    add(
        "--set_to_none",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of optimizer.zero_grad(); --no-set_to_none leaves zeros, with which optimizers go on "
        "moving a layer that requires_grad_(False) was to hold",
    )
    add(
        "--reset_state",
        action="store_true",
        help="when a layer's turn comes, its optimizer state begins anew",
    )
    args = parser.parse_args()
    check_output_arguments(parser, args)
    if args.max_train_steps is None and args.num_train_epochs is None:
        args.max_train_steps = MAX_TRAIN_STEPS
    if args.resume_from_checkpoint == "latest" and args.output_dir is None:
        parser.error("--resume_from_checkpoint latest needs the --output_dir of the earlier job")
    if args.freezing != "exact" and args.reset_state:
        parser.error("--reset_state is of --freezing exact")
    if args.freezing != "exact" and not args.set_to_none and args.resume_from_checkpoint:
        parser.error("no resume here: checkpoints hold no gradients, and here zeros move a layer")
    try:
        try_optimizer(args)
    except ValueError as error:
        parser.error(str(error))
    except Exception as error:  # classes of torch.optim refuse bad values in many ways
        parser.error(f"{args.optimizer} fails with these arguments in its first steps: {error}")
    return args


class TwoInputs(nn.Module):
    """Two first layers over one ``output``. No biases: Muon takes matrices only."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_task1, self.hidden_task2 = (
            nn.Sequential(
                nn.Linear(NUM_FEATURES[task], HIDDEN_SIZE, bias=False),
                nn.ReLU(),
                nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE, bias=False),
                nn.ReLU(),
            )
            for task in TASKS
        )
        self.output = nn.Linear(HIDDEN_SIZE, NUM_CLASSES, bias=False)

    def forward(self, features: Tensor, task: int) -> Tensor:
        """Logits (N, 10) from features (N, 64) of task 1 or (N, 16) of task 2."""
        logits: Tensor = self.output(self.get_submodule(f"hidden_task{task}")(features))
        return logits


def features_of(images: Tensor, task: int) -> Tensor:
    """What a task sees of images (N, 8, 8): pixels (N, 64), or scaled sums (N, 16)."""
    if task == 1:
        return images.flatten(1)
    return torch.cat([images.sum(2), images.sum(1)], dim=1) / 4


def load_data(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Training and evaluation digits: images (N, 8, 8) in [-1, 1] and class numbers (N,)."""
    bunch = load_digits()
    images = torch.tensor(bunch.images / 8.0 - 1.0, dtype=torch.float32)
    digits = torch.tensor(bunch.target)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    evaluation, training = order.tensor_split([NUM_EVALUATION])
    return (
        TensorDataset(images[training], digits[training]),
        TensorDataset(images[evaluation], digits[evaluation]),
    )


def task_at(step: int, steps_per_task: int) -> int:
    """The task that trains after ``step`` completed optimizer steps, on every rank."""
    return TASKS[step // steps_per_task % len(TASKS)]


@contextlib.contextmanager
def turn_of(
    task: int, args: argparse.Namespace, model: nn.Module, optimizer: Optimizer
) -> Iterator[None]:
    """Hold the other task's layer in the block, in the way that ``--freezing`` says."""
    resting = f"hidden_task{TASKS[1] if task == TASKS[0] else TASKS[0]}"
    if args.freezing == "exact":
        with frozen(model, resting, optimizer=optimizer, reset_state=args.reset_state):
            yield
        return
    layer = extract_model_from_parallel(model).get_submodule(resting)
    layer.requires_grad_(False)
    yield
    layer.requires_grad_(True)


def try_optimizer(args: argparse.Namespace) -> None:
    """Let the optimizer make a step of each task, so that what it refuses shows at once."""
    model = TwoInputs()
    optimizer = build_optimizer(args, model.parameters())
    for task in TASKS:
        with turn_of(task, args, model, optimizer):
            model(torch.ones(1, NUM_FEATURES[task]), task).sum().backward()
            optimizer.step()


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: nn.Module, dataset: TensorDataset
) -> dict[str, float]:
    """Accuracy of both tasks in %. No collective: every rank evaluates all."""
    plain_model = accelerator.unwrap_model(model)
    images, digits = (tensor.to(accelerator.device) for tensor in dataset.tensors)
    accuracies = {}
    for task in TASKS:
        predicted = plain_model(features_of(images, task), task).argmax(dim=1)
        accuracies[f"task{task}"] = 100.0 * float((predicted == digits).double().mean())
    return accuracies


def main() -> None:
    """Train both tasks by turns."""
    args = parse_arguments()
    start_time = time.monotonic()

    # -- accelerator ----------------------------------------------------------------------------
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        # The forward of one task does not use the other's layer, whose gradient DDP would await.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir="runs",
    )
    configure_logging(accelerator)
    with clean_errors(ValueError):
        check_configuration(accelerator)
    set_seed(args.seed)
    output_dir = output_directory(args, "alternating")

    # -- data, model ----------------------------------------------------------------------------
    training, evaluation = load_data(args.seed)
    batch_size = args.per_device_train_batch_size
    dataloader = DataLoader(training, batch_size=batch_size, shuffle=True, drop_last=True)
    model = TwoInputs()
    optimizer = build_optimizer(args, model.parameters())
    layers = dict(model.named_children())

    # -- prepare --------------------------------------------------------------------------------
    model, optimizer, dataloader = accelerator.prepare(model, optimizer, dataloader)
    completed, changes = CompletedSteps(), ChangeRecord(layers, optimizer)
    accelerator.register_for_checkpointing(completed, changes)
    steps_per_epoch = math.ceil(len(dataloader) / args.gradient_accumulation_steps)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    checkpointing_steps = args.checkpointing_steps
    if checkpointing_steps == "epoch":
        checkpointing_steps = steps_per_epoch
    start_tracking(accelerator, output_dir, vars(args))
    with clean_errors(ValueError):
        if args.resume_from_checkpoint is not None:
            checkpoint = find_checkpoint(args.resume_from_checkpoint, output_dir)
            accelerator.load_state(str(checkpoint))
            logger.info(f"resumed from {checkpoint} at step {completed.value}")
        batches = endless_batches(accelerator, dataloader, completed.value)

    # -- train ----------------------------------------------------------------------------------
    facts = {
        "Num examples": len(training),
        "Per-device batch size": batch_size,
        "Num processes": accelerator.num_processes,
        "Gradient accumulation steps": args.gradient_accumulation_steps,
        "Total optimization steps": max_train_steps,
        "Steps per task": args.steps_per_task,
    }
    logger.info(banner("Running training", facts))
    progress = tqdm(
        total=max_train_steps,
        initial=completed.value,
        desc="alternating",
        disable=not accelerator.is_main_process,
    )

    turn = contextlib.ExitStack()
    task = None
    for _, (images, digits) in batches:
        if completed.value >= max_train_steps:
            break
        if task is None:  # also after a resume in the middle of a turn
            task = task_at(completed.value, args.steps_per_task)
            turn.enter_context(turn_of(task, args, model, optimizer))
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(features_of(images, task), task), digits)
            accelerator.backward(loss)
            with changes.step_of(f"task{task}", enabled=accelerator.sync_gradients):
                optimizer.step()
                optimizer.zero_grad(set_to_none=args.set_to_none)
        if not accelerator.sync_gradients:
            continue
        completed.value += 1
        progress.update()
        if accelerator.log_with:
            metrics = {f"change/{layer} (max abs)": value for layer, value in changes.last.items()}
            mean_loss = accelerator.reduce(loss.detach(), reduction="mean").item()
            metrics |= {f"loss/task{task} (per sample)": mean_loss, "train/task (number)": task}
            if completed.value % args.eval_steps == 0 and completed.value < max_train_steps:
                accuracies = evaluate(accelerator, model, evaluation)
                metrics |= {f"accuracy/{name} (%)": value for name, value in accuracies.items()}
            accelerator.log(metrics, step=completed.value)
        if completed.value % args.steps_per_task == 0:
            turn.close()  # before a checkpoint, which then holds what --reset_state has left
            task = None
        if checkpointing_steps and completed.value % checkpointing_steps == 0:
            save_checkpoint(accelerator, output_dir, completed.value, args.checkpoints_total_limit)
    turn.close()

    # -- results --------------------------------------------------------------------------------
    progress.close()
    accuracies = evaluate(accelerator, model, evaluation)
    final = {f"accuracy/{name} (%)": value for name, value in accuracies.items()}
    accelerator.log(final, step=completed.value)
    if any(others != changes.state_dict() for others in gather_object([changes.state_dict()])):
        raise RuntimeError("the ranks did not change the same layers by the same amounts")
    results = {
        "recipe": "alternating",
        "accuracies (%)": accuracies,
        "completed_steps": completed.value,
        "changes": changes.state_dict(),
        "num_processes": accelerator.num_processes,
        "seconds": time.monotonic() - start_time,
    }
    write_results(output_dir, results, final_weights(accelerator, model))
    if accelerator.is_main_process:
        Console().print(changes.table())
    logger.info(f"accuracy: {describe_accuracies(accuracies)}")
    logger.info(closing_line(accelerator, output_dir))
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    with clean_errors():
        main()
