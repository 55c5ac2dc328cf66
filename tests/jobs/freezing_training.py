"""Ways to train on two ranks while a layer rests. Part of ``freezing_job``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from tests import IS_OLD_FSDP2
from tests.frozen_cases import (
    OPTIMIZERS,
    REST,
    Net,
    batches,
    build_net,
    squared_error,
)

NUM_RANKS, STEPS = 2, 2
SCALE = 1024.0  # of the loss, with Accelerate
MODES: dict[str, tuple[str, ...]] = {
    "default": (),
    "find-unused": ("find_unused_parameters",),
    "static-graph": ("static_graph",),
    "bucket-view": ("gradient_as_bucket_view",),
    "bucket-view-find-unused": ("gradient_as_bucket_view", "find_unused_parameters"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One way to freeze on two ranks.

    Attributes:
        optimizer: a name in ``OPTIMIZERS``.
        mode: of DistributedDataParallel, or ``fsdp2``.
        situation: of the resting layer: ``used`` in the forward, ``unused``, or ``stale``: unused
            and left out where gradients are zeroed.
        set_to_none: how gradients are zeroed.
        requires_grad: False for the mode that saves compute.
        accumulation: backward passes per step, all but the last under ``no_sync``.
        prepared: by Accelerate, with ``accumulate`` and a loss scaler that overflows once, in the
            resting layer.
        naively: rest by ``requires_grad_(False)`` alone, or by dropping gradients on one rank.
    """

    optimizer: str = "adam-foreach"
    mode: str = "default"
    situation: str = "used"
    set_to_none: bool = True
    requires_grad: bool = True
    accumulation: int = 1
    prepared: bool = False
    naively: str = ""

    @property
    def name(self) -> str:
        """For the test's report."""
        parts = [self.optimizer, self.mode, self.situation]
        parts += [] if self.set_to_none else ["to-zero"]
        parts += [] if self.requires_grad else ["saving-compute"]
        parts += [f"window-of-{self.accumulation}"] if self.accumulation > 1 else []
        parts += ["prepared"] if self.prepared else []
        parts += [self.naively] if self.naively else []
        return "-".join(parts)


def _cases() -> Iterator[Case]:
    for optimizer in OPTIMIZERS:
        for set_to_none in (True, False):
            yield Case(optimizer=optimizer, set_to_none=set_to_none)
            yield Case(
                optimizer=optimizer, mode="find-unused", situation="unused", set_to_none=set_to_none
            )
    for optimizer in ("adam-foreach", "momentum-fused", "adamw-fused"):
        for mode in MODES:
            cope = "find_unused_parameters" in MODES[mode]
            for situation in ("used", "unused") if cope else ("used",):
                for requires_grad in (True, False) if cope else (True,):
                    for accumulation in (1, 3) if mode != "static-graph" else (1,):
                        yield Case(
                            optimizer=optimizer,
                            mode=mode,
                            situation=situation,
                            requires_grad=requires_grad,
                            accumulation=accumulation,
                        )
    for mode in ("default", "find-unused"):
        for optimizer in ("adam-foreach", "adamw-fused"):
            yield Case(optimizer=optimizer, mode=mode, accumulation=3, prepared=True)
    for optimizer in ("adam-foreach", "adamw-fused", "momentum-loop") if not IS_OLD_FSDP2 else ():
        for situation in ("used", "unused", "stale"):
            for set_to_none in (True, False):
                yield Case(
                    optimizer=optimizer, mode="fsdp2", situation=situation, set_to_none=set_to_none
                )


CASES = {case.name: case for case in _cases()}
NAIVE_CASES = {
    case.name: case
    for case in (
        Case(naively="requires-grad", mode="find-unused", situation="unused", set_to_none=False),
        Case(naively="one-rank-drops"),
    )
}


@dataclasses.dataclass(kw_only=True)
class Trainee:
    """A model in the form that its loop uses, with its optimizer."""

    net: Net
    model: nn.Module
    optimizer: Optimizer
    accelerator: Accelerator | None = None


def build(case: Case, values: dict[str, Any], *, knows_the_layer: bool) -> Trainee:
    """A model of the weights ``values``, whose optimizer may know the resting layer or not."""
    net = build_net()
    net.load_state_dict(values)
    if not knows_the_layer:
        resting = net.get_submodule(REST).requires_grad_(False)
        resting.register_forward_pre_hook(lambda module, args: module.eval() and None)
    model: nn.Module = net
    if case.mode == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (net.hidden_task1, net.hidden_task2, net.output):
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    elif not case.prepared:
        options: dict[str, Any] = dict.fromkeys(MODES[case.mode], True)
        model = DistributedDataParallel(net, **options)
    optimizer = OPTIMIZERS[case.optimizer](
        param for param in net.parameters() if knows_the_layer or param.requires_grad
    )
    if not case.prepared:
        return Trainee(net=net, model=model, optimizer=optimizer)
    if knows_the_layer:  # the other one is made of the same settings, beside this one
        for state in (AcceleratorState, GradientState):  # shared by all accelerators of a process
            state._reset_state()
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="fp16",
        gradient_accumulation_steps=case.accumulation,
        kwargs_handlers=[DistributedDataParallelKwargs(**dict.fromkeys(MODES[case.mode], True))],
    )
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    model = accelerator.prepare(net)
    accelerator.native_amp = True
    optimizer = accelerator.prepare(optimizer)
    return Trainee(net=net, model=model, optimizer=optimizer, accelerator=accelerator)


def local(kept: dict[str, Any]) -> dict[str, Any]:
    """This rank's part of what is sharded."""
    return {
        name: value.to_local().clone() if isinstance(value, DTensor) else value
        for name, value in kept.items()
    }


def train(trainee: Trainee, case: Case, seed: int = 2) -> None:
    """``STEPS`` steps with clipping; every rank and micro-step has a batch of its own."""
    rank, optimizer = dist.get_rank(), trainee.optimizer
    parts = list(batches(STEPS * case.accumulation * NUM_RANKS, seed))[rank::NUM_RANKS]
    for number, (first, second, wanted) in enumerate(parts):
        trainee.model.train()
        torch.manual_seed(number)  # of the dropout
        with window(trainee, case, ends=(number + 1) % case.accumulation == 0) as ends:
            loss = squared_error(
                trainee.model(first, second if case.situation == "used" else None), wanted
            )
            if trainee.accelerator is not None:
                trainee.accelerator.backward(loss)
            else:
                loss.backward()
            if case.naively == "one-rank-drops" and rank == 0:
                trainee.net.get_parameter(f"{REST}.0.weight").grad = None
            if trainee.accelerator is not None and ends:
                trainee.accelerator.clip_grad_norm_(trainee.net.parameters(), 0.1)
            elif ends:
                nn.utils.clip_grad_norm_(trainee.net.parameters(), 0.1)
            if ends or case.prepared:  # Accelerate's optimizer knows when
                optimizer.step()
                zero_gradients(trainee, case)
    if trainee.accelerator is not None:
        assert trainee.accelerator.scaler.get_scale() == SCALE, "a step was skipped"


def zero_gradients(trainee: Trainee, case: Case) -> None:
    """After a step, or in the middle of a window with Accelerate, which knows when."""
    if case.situation != "stale":
        trainee.optimizer.zero_grad(set_to_none=case.set_to_none)
        return
    for name, parameter in trainee.net.named_parameters():
        if not name.startswith(REST) and parameter.grad is not None:
            parameter.grad = None if case.set_to_none else torch.zeros_like(parameter)


@contextlib.contextmanager
def window(trainee: Trainee, case: Case, ends: bool) -> Iterator[bool]:
    """A micro-step, which may end an accumulation window."""
    if trainee.accelerator is not None:
        with trainee.accelerator.accumulate(trainee.model):
            yield trainee.accelerator.sync_gradients
    elif ends or case.mode == "fsdp2":
        yield ends
    else:
        assert isinstance(trainee.model, DistributedDataParallel)
        with trainee.model.no_sync():
            yield ends


def warmed_up(case: Case) -> Trainee:
    """A model with moments everywhere."""
    case = dataclasses.replace(case, situation="used", naively="")
    trainee = build(case, build_net().state_dict(), knows_the_layer=True)
    train(trainee, case, seed=1)
    for buffer in trainee.net.buffers():  # as DistributedDataParallel does at the next forward
        dist.broadcast(buffer, 0)
    return trainee
