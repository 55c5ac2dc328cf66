"""What an optimizer remembers of single parameters that begin to train later than the others.

Most optimizers of torch make a parameter's state in the first step that finds a gradient. Two need
it before: ``Adagrad`` makes it for all parameters when it is made, and ``SGD(fused=True)`` with
momentum takes either a momentum of every parameter or of none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adagrad, Optimizer


def forget_state(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Let the next step treat ``parameters`` as its first one did."""
    for parameter in parameters:
        if optimizer.state.pop(parameter, None) and isinstance(optimizer, Adagrad):
            groups = [{**_group_of(optimizer, parameter), "params": [parameter]}]
            optimizer.state[parameter] = Adagrad(groups).state[parameter]


def complete_state(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Give fused SGD the momentum that it misses in ``parameters`` if others have theirs.

    From zero, momentum begins as it does where there is none. With ``dampening`` it does not, so
    that nothing is done, and torch raises a TypeError in the next step.
    """
    if not isinstance(optimizer, SGD):
        return
    for parameter in parameters:
        group = _group_of(optimizer, parameter)
        if not (group.get("fused") and group["momentum"]) or group["dampening"]:
            continue
        missing = optimizer.state.get(parameter, {}).get("momentum_buffer") is None
        if missing and any(optimizer.state.get(other) for other in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.detach())


def _group_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """The parameter's group; empty if the optimizer does not hold it."""
    for group in optimizer.param_groups:
        if any(parameter is one for one in group["params"]):
            return group
    return {}
