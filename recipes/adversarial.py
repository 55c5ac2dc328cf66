"""Two models, two losses, two optimizers: a Wasserstein GAN that draws digits.

    accelerate launch recipes/adversarial.py
    accelerate launch --config_file accelerate_configs/cpu_2proc.yaml recipes/adversarial.py

The generator's output is the critic's input. One forward of the generator serves both losses;
loss1 moves the critic only, loss2 the generator only, each through an RMSprop of its own. The first
steps are checked for leaks, bit by bit. The losses are those of Gulrajani et al. 2017 (gradient
penalty instead of clipped weights), on scikit-learn's digits, with the digit to draw as an input.
TensorBoard's page Images shows what it draws.
"""

from __future__ import annotations

import argparse
import math
import time
import zlib

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from toolkit.arguments import check_output_arguments, output_arguments, step_arguments
from toolkit.checkpoints import CompletedSteps, find_checkpoint, save_checkpoint
from toolkit.configuration import check_configuration
from toolkit.data import endless_batches
from toolkit.flag_types import (
    DefaultsFormatter,
    non_negative_float,
    non_negative_int,
    positive_float,
)
from toolkit.isolation import CutPoint, backward_for, check_disjoint, no_leak, one_loss_scale
from toolkit.metrics import PatientTensorBoard, closing_line, image_grid, start_tracking
from toolkit.models import ConditionalPerceptron
from toolkit.training import (
    banner,
    clean_errors,
    configure_logging,
    output_directory,
    write_results,
)

logger = get_logger(__name__)

MAX_TRAIN_STEPS = 8000
NUM_CLASSES, SIDE = 10, 8  # ten digits of 8 x 8 pixels
LATENT_SIZE, HIDDEN_SIZE = 16, 128  # random inputs of the generator; width of both models
SAMPLES_PER_DIGIT, COLUMNS = 50, 12  # drawn to evaluate; of which shown


def parse_arguments() -> argparse.Namespace:
    """Parse the command line and end with a message where it makes no sense."""
    parser = argparse.ArgumentParser(
        description="Train a Wasserstein GAN on digits, each model by its own loss and optimizer.",
        parents=[step_arguments(MAX_TRAIN_STEPS), output_arguments()],
        formatter_class=DefaultsFormatter,
    )
    parser.set_defaults(per_device_train_batch_size=64, eval_steps=500)
    add = parser.add_argument_group("the two models").add_argument
    add("--critic_learning_rate", type=positive_float, default=1e-3, help="of its RMSprop")
    add("--generator_learning_rate", type=positive_float, default=5e-4, help="of its RMSprop")
    add("--gradient_penalty", type=non_negative_float, default=1.0, help="its weight in loss1")
    add(
        "--leak_check_steps",
        type=non_negative_int,
        default=10,
        help="of this job's first optimizer steps, how many end with an error if a loss or a step "
        "moves anything of the other model",
    )
    args = parser.parse_args()
    check_output_arguments(parser, args)
    if args.max_train_steps is None and args.num_train_epochs is None:
        args.max_train_steps = MAX_TRAIN_STEPS
    if args.resume_from_checkpoint == "latest" and args.output_dir is None:
        parser.error("--resume_from_checkpoint latest needs the --output_dir of the earlier job")
    return args


def build_generator(args: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    """From latents (N, LATENT_SIZE) to images (N, 64); the article's model2, and its optimizer."""
    sizes = (LATENT_SIZE, NUM_CLASSES, HIDDEN_SIZE, SIDE * SIDE)
    model = ConditionalPerceptron(*sizes, nn.Tanh())  # as the images are in [-1, 1]
    return model, torch.optim.RMSprop(model.parameters(), lr=args.generator_learning_rate)


def build_critic(args: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    """From images (N, 64) to scores (N, 1); the article's model1, and its optimizer."""
    model = ConditionalPerceptron(SIDE * SIDE, NUM_CLASSES, HIDDEN_SIZE, 1)
    return model, torch.optim.RMSprop(model.parameters(), lr=args.critic_learning_rate)


def load_data() -> TensorDataset:
    """All digits: images (1797, 64) in [-1, 1] and class numbers (1797,)."""
    bunch = load_digits()
    images = torch.tensor(bunch.images / 8.0 - 1.0, dtype=torch.float32).flatten(1)
    return TensorDataset(images, torch.tensor(bunch.target))


def random_inputs(size: int, *key: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Latents (size, LATENT_SIZE) and mixing weights (size, 1), the same for the same key."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
    latents = torch.randn(size, LATENT_SIZE, generator=generator)
    return latents.to(device), torch.rand(size, 1, generator=generator).to(device)


def penalty(critic: nn.Module, images: Tensor, digits: Tensor) -> Tensor:
    """Mean square of how far the gradient norm of the critic's score is from 1 at ``images``."""
    images = images.detach().requires_grad_()
    score = critic(images, digits).sum()
    (gradient,) = torch.autograd.grad(score, images, create_graph=True)
    return (gradient.norm(dim=1) - 1).square().mean()


@torch.no_grad()
def draw(generator: nn.Module, device: torch.device) -> tuple[Tensor, float]:
    """Let the generator draw every digit.

    Returns:
        A grid (1, H, W), black on white, with a row for each digit from 0 to 9; and the percentage
        of all drawings whose nearest real image shows the digit asked for.
    """
    digits = torch.arange(NUM_CLASSES).repeat_interleave(SAMPLES_PER_DIGIT)
    latents, _ = random_inputs(len(digits), 0, device=device)
    drawn = generator(latents, digits.to(device)).float().cpu()
    images, labels = load_data().tensors
    classifier = KNeighborsClassifier(1).fit(images.numpy(), labels.numpy())
    recognised = 100.0 * float((classifier.predict(drawn.numpy()) == digits.numpy()).mean())
    shown = drawn.view(NUM_CLASSES, SAMPLES_PER_DIGIT, SIDE, SIDE)[:, :COLUMNS]
    return image_grid((1 - shown) / 2), recognised


def evaluate(accelerator: Accelerator, generator: nn.Module, step: int) -> float:
    """Record the drawings of this step; the percentage that is recognised. No collective."""
    grid, recognised = draw(accelerator.unwrap_model(generator), accelerator.device)
    for tracker in accelerator.trackers:
        if isinstance(tracker, PatientTensorBoard):  # each kind takes images in a form of its own
            tracker.log_images({"validation/drawings": grid[None]}, step=step)
    accelerator.log({"accuracy/drawings recognised (%)": recognised}, step=step)
    return recognised


def main() -> None:
    """Train both models."""
    args = parse_arguments()
    start_time = time.monotonic()

    # -- accelerator ----------------------------------------------------------------------------
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir="runs",
    )
    configure_logging(accelerator)
    with clean_errors(ValueError):
        check_configuration(accelerator)
    set_seed(args.seed)
    output_dir = output_directory(args, "adversarial")

    # -- data, models ---------------------------------------------------------------------------
    generator, generator_optimizer = build_generator(args)
    critic, critic_optimizer = build_critic(args)
    batch_size = args.per_device_train_batch_size
    dataloader = DataLoader(load_data(), batch_size=batch_size, shuffle=True, drop_last=True)

    # -- prepare --------------------------------------------------------------------------------
    generator, critic, generator_optimizer, critic_optimizer, dataloader = accelerator.prepare(
        generator, critic, generator_optimizer, critic_optimizer, dataloader
    )
    check_disjoint(critic=(critic, critic_optimizer), generator=(generator, generator_optimizer))
    completed = CompletedSteps()
    accelerator.register_for_checkpointing(completed)
    steps_per_epoch = math.ceil(len(dataloader) / args.gradient_accumulation_steps)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    checkpointing_steps = args.checkpointing_steps
    if checkpointing_steps == "epoch":
        checkpointing_steps = steps_per_epoch
    start_tracking(accelerator, output_dir, vars(args))
    if args.resume_from_checkpoint is not None:
        with clean_errors(ValueError):
            checkpoint = find_checkpoint(args.resume_from_checkpoint, output_dir)
        accelerator.load_state(str(checkpoint))
        logger.info(f"resumed from {checkpoint} at step {completed.value}")
    first_step = completed.value

    # -- train ----------------------------------------------------------------------------------
    facts = {
        "Per-device batch size": args.per_device_train_batch_size,
        "Num processes": accelerator.num_processes,
        "Gradient accumulation steps": args.gradient_accumulation_steps,
        "Total optimization steps": max_train_steps,
    }
    logger.info(banner("Running training", facts))
    progress = tqdm(
        total=max_train_steps,
        initial=first_step,
        desc="adversarial",
        disable=not accelerator.is_main_process,
    )

    with clean_errors(ValueError):
        batches = endless_batches(accelerator, dataloader, first_step)
    for micro_step, (real, digits) in batches:
        if completed.value >= max_train_steps:
            break
        checked = completed.value - first_step < args.leak_check_steps
        key = (args.seed, micro_step, accelerator.process_index)
        latents, mix = random_inputs(len(real), *key, device=real.device)
        with accelerator.accumulate(critic, generator), one_loss_scale(accelerator):
            cut = CutPoint(generator(latents, digits), generator)
            with no_leak(generator, generator_optimizer, enabled=checked):
                fake = cut.detached
                loss1 = critic(fake, digits).mean() - critic(real, digits).mean()
                between = mix * real + (1 - mix) * fake
                penalised = loss1 + args.gradient_penalty * penalty(critic, between, digits)
                backward_for(penalised, critic, accelerator)
                critic_optimizer.step()
                critic_optimizer.zero_grad()
            with no_leak(critic, critic_optimizer, enabled=checked):
                with accelerator.no_sync(critic):  # no gradient of the critic will come
                    loss2 = -critic(cut.attached, digits).mean()
                cut.backward(loss2, accelerator)
                generator_optimizer.step()
                generator_optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        completed.value += 1
        progress.update()
        if accelerator.log_with:
            losses = torch.stack([loss1.detach(), loss2.detach()])
            means = accelerator.reduce(losses, reduction="mean").tolist()
            tags = ("loss/critic (per sample)", "loss/generator (per sample)")
            metrics = dict(zip(tags, means, strict=True))
            accelerator.log(metrics, step=completed.value)
        if completed.value % args.eval_steps == 0 and completed.value < max_train_steps:
            evaluate(accelerator, generator, completed.value)
        if checkpointing_steps and completed.value % checkpointing_steps == 0:
            save_checkpoint(accelerator, output_dir, completed.value, args.checkpoints_total_limit)

    # -- results --------------------------------------------------------------------------------
    progress.close()
    recognised = evaluate(accelerator, generator, completed.value)
    checked_steps = min(args.leak_check_steps, completed.value - first_step)
    results = {
        "recipe": "adversarial",
        "recognised (%)": recognised,
        "completed_steps": completed.value,
        "leak_checked_steps": checked_steps,
        "num_processes": accelerator.num_processes,
        "seconds": time.monotonic() - start_time,
    }
    weights = {
        f"{part}.{name}": tensor
        for part, model in (("generator", generator), ("critic", critic))
        for name, tensor in accelerator.get_state_dict(model).items()
    }
    write_results(output_dir, results, weights)
    logger.info(f"leak check: nothing moved that was to rest, in {checked_steps} steps checked")
    logger.info(f"drawings recognised as the digit asked for: {recognised:.1f} %")
    logger.info(closing_line(accelerator, output_dir))
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    with clean_errors():
        main()
