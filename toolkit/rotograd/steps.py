"""What happens to rotations when an optimizer steps."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


class Stepped(Protocol):
    """A module that wants to know of the steps of the optimizer that holds its parameter."""

    def held_parameter(self) -> nn.Parameter:
        """The parameter by which that optimizer is known."""

    def after_step(self, *, skipped: bool) -> None:
        """It has stepped, or found that it must not (a fused one, at an overflow)."""


_watched: weakref.WeakSet[Any] = weakref.WeakSet()
_hooks: list[Any] = []


def watch(module: Stepped) -> None:
    """Call ``module.after_step`` after each step of an optimizer that holds its parameter.

    The hook is one for the whole process and sees every ``torch.optim.Optimizer``, wrapped by
    Accelerate or not, at steps that really happen. It holds no module alive. Call it in forward:
    copied and unpickled modules are then watched too.
    """
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_after_step))
    _watched.add(module)


def _held_by(optimizer: Optimizer) -> list[Stepped]:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [module for module in list(_watched) if id(module.held_parameter()) in held]


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _watched:
        return
    # A loss scaler leaves it to a fused optimizer to skip its step, and tells it through this.
    found_inf = getattr(optimizer, "found_inf", None)
    for module in _held_by(optimizer):
        module.after_step(skipped=found_inf is not None and bool(found_inf))


@contextlib.contextmanager
def cached() -> Iterator[None]:
    """One forward and its backward, as in the package of the paper's authors.

    There each rotation is a matrix exponential, computed once in the block and stale after a step.
    Here nothing needs to be cached, and only the promise is kept: no step in the block.

    Raises:
        RuntimeError: (from ``step()``) if an optimizer of rotations steps inside the block.
    """

    def refuse(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if _held_by(optimizer):
            raise RuntimeError(
                "an optimizer that holds rotations steps inside `with rotograd.cached():`, where "
                "they must stay as they are: move `optimizer.step()` behind the block"
            )

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
