"""What freezing needs of a model, its optimizers and the other ranks, checked before it begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from toolkit.parameters import innermost_optimizer
from toolkit.selection import Selection, listed


def innermost_optimizers(optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """The optimizers that really step, without Accelerate's wrappers.

    Raises:
        TypeError: for what is no optimizer of torch's kind.
        ValueError: for one whose steps mix the parameters.
    """
    found = []
    for candidate in optimizer if isinstance(optimizer, Iterable) else [optimizer]:
        inner = innermost_optimizer(candidate)
        if not isinstance(inner, Optimizer):
            raise TypeError(f"optimizer is a {type(inner).__name__}; give a torch.optim.Optimizer")
        if isinstance(inner, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS takes a missing gradient for zero and moves all parameters along its common "
                "history: nothing can be frozen under it. Make it of the trained parameters only"
            )
        found.append(inner)
    return found


def ddp_of(model: nn.Module) -> DistributedDataParallel | None:
    """The wrapper of a model, also under ``torch.compile``; None if there is none."""
    wrapper = getattr(model, "_orig_mod", model)
    return wrapper if isinstance(wrapper, DistributedDataParallel) else None


def check_wrappers(model: nn.Module) -> None:
    """Refuse wrappers that step something else than ``parameter.grad`` of the model's parameters.

    Raises:
        ValueError: naming the wrapper and what to use instead.
    """
    outermost = ddp_of(model)
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(
                "FullyShardedDataParallel (FSDP1) may keep frozen and trained parameters in one "
                "tensor: use FSDP2 (torch.distributed.fsdp.fully_shard, fsdp_version: 2)"
            )
        if any(cls.__name__ == "DeepSpeedEngine" for cls in type(module).__mro__):
            raise ValueError(
                "DeepSpeed steps its own copies of parameters and gradients: make its optimizer of "
                "the trained parameters only, or use DistributedDataParallel or FSDP2"
            )
        if isinstance(module, DistributedDataParallel) and module is not outermost:
            raise ValueError(
                "DistributedDataParallel wraps a part of this model only: freeze in the wrapped "
                "part, giving the wrapper as model"
            )


def check_in_optimizers(selection: Selection, optimizers: Sequence[Optimizer]) -> None:
    """Refuse parameters that none of the optimizers would step: another one may.

    Raises:
        ValueError: naming them.
    """
    stepped = {
        id(parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    absent = [
        name
        for name, parameter in selection.parameters.items()
        if parameter.requires_grad and id(parameter) not in stepped
    ]
    if absent:
        raise ValueError(
            f"parameters to freeze in no group of the given optimizer: {listed(absent)}. Give "
            "every optimizer that steps them; freeze after accelerator.prepare(), which may "
            "replace parameters"
        )


def check_gradients_not_needed(model: nn.Module, selection: Selection) -> None:
    """Refuse to switch ``requires_grad`` off where something relies on the gradients.

    Raises:
        ValueError: with the reason and the remedy.
    """
    ddp = ddp_of(model)
    reason = ""
    if any(isinstance(parameter, DTensor) for parameter in selection.parameters.values()):
        reason = "FSDP2 looks at requires_grad once, when it first gathers the parameters"
    elif ddp is not None and ddp.static_graph:
        reason = "static_graph lets DistributedDataParallel rely on the first step's graph"
    elif ddp is not None and not ddp.find_unused_parameters:
        reason = (
            "DistributedDataParallel waits for the gradients of all parameters that had "
            "requires_grad when it was made; with find_unused_parameters=True it does not"
        )
    elif ddp is None and _num_processes() > 1:
        reason = "it cannot be told how this unwrapped model averages gradients over the ranks"
    if reason:
        raise ValueError(
            f"requires_grad=False is not safe here: {reason}. Leave requires_grad=True, which "
            "freezes as well and costs the backward pass of the frozen part"
        )


def check_gradients_averaged(model: nn.Module, selection: Selection) -> None:
    """Refuse a step with gradients that DistributedDataParallel has not averaged.

    It waits for every parameter that it expects a gradient of, and would itself complain in the
    next forward only, after a step that has moved the ranks apart.

    Raises:
        RuntimeError: naming what is frozen; torch's own error, its cause, has the numbers of the
            parameters that got no gradient.
    """
    ddp = ddp_of(model)
    if ddp is None:
        return
    frozen = listed(list(selection.parameters))
    try:
        ddp._check_reducer_finalized()
    except RuntimeError as error:
        raise RuntimeError(
            "DistributedDataParallel has not averaged the gradients of this step, as some "
            f"parameters took no part in the forward pass; frozen are {frozen}. Use all in every "
            "forward, or give DistributedDataParallel find_unused_parameters=True without "
            "static_graph (accelerate.DistributedDataParallelKwargs)"
        ) from error


def check_ranks_agree(what: str, names: Sequence[str] = ()) -> None:
    """Compare what all ranks are about to do. A collective; alone, nothing happens.

    Args:
        what: in words; begins with ``error`` on a rank that is about to raise by itself.
        names: of the parameters.

    Raises:
        ValueError: if they differ, unless it is this rank that failed; with every rank's words.
    """
    if _num_processes() == 1:
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (what, list(names)))
    if what.startswith("error") or all(one == everyone[0] for one in everyone):
        return
    lines = []
    for rank, (words, theirs) in enumerate(everyone):
        others = set().union(*(other for _, other in everyone if other != theirs))
        missing = sorted(others - set(theirs)) if theirs else []
        lines.append(f"rank {rank}: {words}" + (f" (not {listed(missing)})" if missing else ""))
    raise ValueError(
        "the ranks must freeze and unfreeze the same parameters at the same time, else their "
        "weights drift apart without an error; " + "; ".join(lines)
    )


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
