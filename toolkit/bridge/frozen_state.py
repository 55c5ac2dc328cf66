"""Optimizer state that a checkpoint of a sharded job would lose.

For FSDP2 models Accelerate loads optimizer state through ``torch.distributed.checkpoint``, which
leaves out parameters with ``requires_grad=False``. A receiver's optimizer steps the donor's head,
which is such a one: without its moments a resume would go other ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from toolkit.sharding import full_tensor, is_sharded, shard_like


class FrozenOptimizerState:
    """Carries the state of frozen sharded parameters (``accelerator.register_for_checkpointing``).

    Args:
        optimizer: bare, not the one that ``prepare`` returns.
        parameters: frozen and sharded ones that it steps, by name.
    """

    def __init__(self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
        self._optimizer, self._parameters = optimizer, parameters

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint holds: the state by name, whole, on the CPU. A collective."""
        return {
            name: {key: _whole(value) for key, value in self._optimizer.state[parameter].items()}
            for name, parameter in self._parameters.items()
            if parameter in self._optimizer.state
        }

    def load_state_dict(self, content: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from a checkpoint."""
        for name, state in content.items():
            parameter = self._parameters[name]
            self._optimizer.state[parameter] = {
                key: self._placed(value, parameter) for key, value in state.items()
            }

    def _placed(self, value: Any, parameter: nn.Parameter) -> Any:
        """Where the optimizer keeps it: sharded, if it has the parameter's shape."""
        if not isinstance(value, Tensor):
            return value
        if value.shape == parameter.shape:
            return shard_like(value, parameter)
        groups = self._optimizer.param_groups
        group = next(g for g in groups if any(p is parameter for p in g["params"]))
        on_device = group.get("fused") or group.get("capturable")  # its count of steps
        return value.to(parameter.device) if on_device else value


def frozen_sharded(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those of ``parameters`` that are sharded and require no gradient."""
    return {name: p for name, p in parameters.items() if is_sharded(p) and not p.requires_grad}


def _whole(value: Any) -> Any:
    return full_tensor(value).cpu() if isinstance(value, Tensor) else value
