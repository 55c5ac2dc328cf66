"""Two models trained in isolation, case after case; also the reference in one process.

Launched with ``accelerate launch``, it trains every case under DistributedDataParallel and writes
each rank's weights. ``reference`` trains the same on the full batch in plain torch.
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.optim import RMSprop

from tests.jobs.every_case import train_all
from toolkit.isolation import CutPoint, backward_for, check_disjoint, no_leak, one_loss_scale

NUM_RANKS, NUM_STEPS, BATCH_SIZE = 2, 6, 5  # the batch is one rank's, of one micro-step
OVERFLOW_STEP = 2  # with a scaler: loss1 is infinite on the last rank in this step's last part
DTYPE = torch.float64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train.

    Attributes:
        ddp: arguments of DistributedDataParallel to set to true.
        accumulation: micro-steps per step.
        together: both backwards and then both steps, with one forward of both models for both.
        no_sync: whether the critic's forward for loss2 is said to bring it no gradients.
        scaler: whether a loss scaler is at work, and overflows once.
    """

    name: str
    ddp: tuple[str, ...] = ()
    accumulation: int = 1
    together: bool = False
    no_sync: bool = True
    scaler: bool = False


CASES = [
    Case(name="default"),
    Case(name="accumulated", accumulation=3),
    Case(name="accumulated-without-no-sync", accumulation=3, no_sync=False),
    Case(name="find-unused", ddp=("find_unused_parameters",), accumulation=2),
    Case(name="bucket-view", ddp=("gradient_as_bucket_view",), accumulation=2),
    Case(
        name="static-graph", ddp=("static_graph",), no_sync=False
    ),  # torch allows it no accumulation
    Case(name="together", accumulation=2, together=True),
    Case(name="scaler", accumulation=2, scaler=True),
    Case(name="scaler-together", together=True, scaler=True),
]


def build() -> tuple[nn.Module, nn.Module]:
    """Critic and generator."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    generator = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5))
    return critic.to(DTYPE), generator.to(DTYPE)


def batch(step: int, part: int, rank: int) -> tuple[Tensor, Tensor]:
    """Latents and real samples of one micro-step of one rank."""
    random = torch.Generator().manual_seed(10_000 * step + 100 * part + rank)
    latents = torch.randn(BATCH_SIZE, 3, generator=random, dtype=DTYPE)
    return latents, torch.randn(BATCH_SIZE, 5, generator=random, dtype=DTYPE)


def overflows(case: Case, step: int, part: int, rank: int) -> bool:
    """Whether loss1 is infinite here."""
    last = (OVERFLOW_STEP, case.accumulation - 1, NUM_RANKS - 1)
    return case.scaler and (step, part, rank) == last


def train(case: Case) -> dict[str, Tensor]:
    """Train a case in this rank, with every step checked for leaks; the weights."""
    for state in (AcceleratorState, GradientState):  # shared by all accelerators of a process
        state._reset_state()
    options = dict.fromkeys(case.ddp, True)
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=case.accumulation,
        mixed_precision="fp16" if case.scaler else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(**options)],
    )
    assert accelerator.num_processes == NUM_RANKS
    if case.scaler:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    critic, generator = build()
    optimizers = [RMSprop(model.parameters(), lr=1e-2) for model in (critic, generator)]
    critic, generator = accelerator.prepare(critic, generator)
    accelerator.native_amp = case.scaler
    critic_optimizer, generator_optimizer = accelerator.prepare(*optimizers)
    check_disjoint(critic=(critic, critic_optimizer), generator=(generator, generator_optimizer))
    rank = accelerator.process_index
    for number in range(NUM_STEPS * case.accumulation):
        step, part = divmod(number, case.accumulation)
        latents, real = batch(step, part, rank)
        with accelerator.accumulate(critic, generator), one_loss_scale(accelerator):
            cut = CutPoint(generator(latents), generator)
            score = critic(cut.attached if case.together else cut.detached).mean()
            loss1 = score - critic(real).mean()
            if overflows(case, step, part, rank):
                loss1 = loss1 * torch.inf
            with no_leak(generator, generator_optimizer):
                backward_for(loss1, critic, accelerator, retain_graph=case.together)
                if not case.together:
                    critic_optimizer.step()
                    critic_optimizer.zero_grad()
            if not case.together:
                with accelerator.no_sync(critic) if case.no_sync else contextlib.nullcontext():
                    score = critic(cut.attached).mean()
            with no_leak(critic, critic_optimizer):
                cut.backward(-score, accelerator)
            if case.together:
                critic_optimizer.step()
                critic_optimizer.zero_grad()
            with no_leak(critic, critic_optimizer):
                generator_optimizer.step()
                generator_optimizer.zero_grad()
    assert accelerator.scaler is None or accelerator.scaler.get_scale() == 512.0
    weights = {
        f"{name}.{key}": tensor.clone()
        for name, model in (("critic", critic), ("generator", generator))
        for key, tensor in accelerator.unwrap_model(model).state_dict().items()
    }
    accelerator.free_memory()
    return weights


def reference(case: Case) -> dict[str, Tensor]:
    """The same on the full batch, in one process and with a forward of its own for each loss."""
    models = critic, generator = build()
    optimizers = [RMSprop(model.parameters(), lr=1e-2) for model in models]
    for step in range(NUM_STEPS):
        # By micro-step, the samples of all ranks: both models hold still within a window.
        parts = []
        for part in range(case.accumulation):
            columns = zip(*(batch(step, part, rank) for rank in range(NUM_RANKS)), strict=True)
            parts.append([torch.cat(column) for column in columns])
        before = [parameter.detach().clone() for parameter in critic.parameters()]
        loss1 = sum(
            critic(generator(latents).detach()).mean() - critic(real).mean()
            for latents, real in parts
        )
        gradients1 = torch.autograd.grad(loss1 / case.accumulation, list(critic.parameters()))
        if not (case.scaler and step == OVERFLOW_STEP):
            _step(optimizers[0], critic, gradients1)
        # The last micro-step's loss2 sees the critic after its step, the others before it.
        after = [parameter.detach().clone() for parameter in critic.parameters()]
        gradients2 = []
        for part, (latents, _) in enumerate(parts):
            stepped = part == case.accumulation - 1 and not case.together
            _load(critic, after if stepped else before)
            loss2 = -critic(generator(latents)).mean() / case.accumulation
            gradients2.append(torch.autograd.grad(loss2, list(generator.parameters())))
        _load(critic, after)
        sums = [torch.stack(gradients).sum(0) for gradients in zip(*gradients2, strict=True)]
        _step(optimizers[1], generator, sums)
    return {
        f"{name}.{key}": tensor
        for name, model in zip(("critic", "generator"), models, strict=True)
        for key, tensor in model.state_dict().items()
    }


def _step(
    optimizer: RMSprop, model: nn.Module, gradients: list[Tensor] | tuple[Tensor, ...]
) -> None:
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


def _load(model: nn.Module, values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)


if __name__ == "__main__":
    train_all(train, CASES)
