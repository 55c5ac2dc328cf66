"""RotoGrad on ranks that share a batch, case after case; also the reference in one process.

Launched with ``accelerate launch``, it trains every case under DistributedDataParallel and writes
each rank's state. ``reference`` trains the same on the full batch, in plain torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.nn import functional as F

from tests.jobs.every_case import train_all
from tests.unit.rotograd_oracle import IN, build
from toolkit.rotograd import RotateOnly, RotoGrad, RotoGradNorm, total

NUM_RANKS, NUM_STEPS = 2, 20
BATCH_SIZES = (5, 3)  # of each rank in one micro-step
OVERFLOW_STEP = 2  # with a scaler: a loss is infinite on the last rank in this step's last part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train.

    Attributes:
        ddp: arguments of DistributedDataParallel to set to true.
        accumulation: micro-steps per step.
        precision: of autocast, or "fp16" for a loss scaler that overflows once.
        absent: whether a task has no labels in turn, on one rank or on both.
        options: of the model.
        tolerance: largest difference to one process.
    """

    name: str
    kind: type[RotateOnly] = RotoGrad
    ddp: tuple[str, ...] = ()
    accumulation: int = 1
    precision: str = "no"
    absent: bool = False
    coop: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-13


CASES = [
    Case(name="default"),
    Case(name="float32", dtype=torch.float32, tolerance=1e-6),
    Case(name="rotate", kind=RotateOnly, options={"normalize_losses": True}),
    Case(name="norm", kind=RotoGradNorm, accumulation=2),
    Case(name="static-graph", ddp=("static_graph",)),
    Case(name="find-unused", ddp=("find_unused_parameters",), accumulation=2),
    Case(name="bucket-view", ddp=("gradient_as_bucket_view",), accumulation=2),
    Case(name="accumulated", accumulation=3),
    Case(name="exact", accumulation=3, options={"exact_accumulation": True}),
    Case(name="absent", absent=True),
    Case(name="coop", coop=True),
    Case(name="scaler", precision="fp16", accumulation=2),
    Case(name="scaler-norm", kind=RotoGradNorm, precision="fp16"),
    Case(name="bf16", precision="bf16", dtype=torch.float32, tolerance=0.01),
]


def new_model(case: Case) -> Any:
    """With a burn-in that ends within the run."""
    model = build(case.kind, dtype=case.dtype, burn_in_period=5, **case.options)
    return model.coop(case.coop)


def new_optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.param_groups(lr=0.01, lr_rotation=0.01), momentum=0.9)


def batch(case: Case, step: int, part: int, rank: int) -> Tensor:
    """Inputs of one micro-step of one rank."""
    random = torch.Generator().manual_seed(10_000 * step + 100 * part + rank)
    inputs = torch.randn(BATCH_SIZES[rank], IN, generator=random, dtype=torch.float64)
    return inputs.to(case.dtype)


def losses_of(
    case: Case, predictions: list[Tensor], inputs: Tensor, step: int, rank: int
) -> list[Tensor]:
    """One rank's mean losses; a factor of 0 keeps the head of an absent task in the graph."""
    losses = []
    for k, prediction in enumerate(predictions):
        loss = 2.0**k * F.mse_loss(prediction[:, 0], torch.sin((k + 1) * inputs[:, k]) + k)
        gone = case.absent and (step % 4, rank) in ((k, 0), (k, 1), (3, k))
        losses.append(loss * (0.0 if gone else 1.0))
    return losses


def train(case: Case) -> dict[str, Tensor]:
    """Train a case in this rank; the final state."""
    for state in (AcceleratorState, GradientState):  # shared by all accelerators of a process
        state._reset_state()
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=case.accumulation,
        mixed_precision=case.precision,
        kwargs_handlers=[DistributedDataParallelKwargs(**dict.fromkeys(case.ddp, True))],
    )
    assert accelerator.num_processes == NUM_RANKS
    scaled = case.precision == "fp16"
    if scaled:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain = new_model(case)
    if accelerator.process_index != 0:  # DistributedDataParallel brings rank 0's, rotations too
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.zero_()
    model = accelerator.prepare(plain)
    accelerator.native_amp = accelerator.native_amp if case.precision == "bf16" else scaled
    optimizer = accelerator.prepare(new_optimizer(accelerator.unwrap_model(model)))
    rank = accelerator.process_index
    for number in range(NUM_STEPS * case.accumulation):
        step, part = divmod(number, case.accumulation)
        inputs = batch(case, step, part, rank)
        with accelerator.accumulate(model):
            losses = losses_of(case, model(inputs), inputs, step, rank)
            if scaled and (step, part, rank) == (OVERFLOW_STEP, case.accumulation - 1, 1):
                losses[1] = losses[1] * torch.inf
            accelerator.backward(total(model, losses))
            optimizer.step()
            optimizer.zero_grad()
    if scaled:
        assert accelerator.scaler.get_scale() == 512.0
    result = {k: v.clone() for k, v in accelerator.unwrap_model(model).state_dict().items()}
    accelerator.free_memory()
    return result


def reference(case: Case) -> dict[str, Tensor]:
    """The same in one process, on the batches of all ranks together."""
    model = new_model(case)
    optimizer = new_optimizer(model)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        for part in range(case.accumulation):
            parts = [batch(case, step, part, rank) for rank in range(NUM_RANKS)]
            with autocast if case.precision == "bf16" else contextlib.nullcontext():
                predictions = [
                    p.float() if p.dtype == torch.bfloat16 else p for p in model(torch.cat(parts))
                ]
            columns = zip(*(one.split(BATCH_SIZES) for one in predictions), strict=True)
            by_rank = [
                losses_of(case, list(column), inputs, step, rank)
                for rank, (column, inputs) in enumerate(zip(columns, parts, strict=True))
            ]
            means = [torch.stack(losses).mean() for losses in zip(*by_rank, strict=True)]
            (model.total(means) / case.accumulation).backward()
        if not (case.precision == "fp16" and step == OVERFLOW_STEP):
            optimizer.step()
    return dict(model.state_dict())


if __name__ == "__main__":
    train_all(train, CASES)
