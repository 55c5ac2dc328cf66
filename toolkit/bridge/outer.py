"""The two ends of the ``delta`` exchange: local steps of a donor, outer steps of the receiver.

A donor takes K optimizer steps of its own from the receiver's weights and sends the difference;
its negative is an outer optimizer's gradient, as in DiLoCo. Other than there, the receiver goes on
meanwhile, and its steps are kept: the difference is added to the weights that it has by then.

Reference: Douillard et al., DiLoCo: Distributed Low-Communication Training of Language Models,
2023, arXiv 2311.08105.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from toolkit.bridge.accumulation import Window
from toolkit.bridge.measures import validation_metrics
from toolkit.bridge.payload import Record, payload_dtype
from toolkit.parameters import SharedParameters
from toolkit.sharding import full_tensor, shard_like


class LocalRound:
    """A donor's local steps since it loaded the receiver's weights.

    Args:
        parameters: what the difference is taken of, by name, with the receiver's weights.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._start = {name: p.detach().clone() for name, p in parameters.items()}
        self.num_windows = 0
        self.count = 0.0
        self._loss_sum = 0.0

    def add(self, window: Window) -> None:
        """Count one more accumulation window."""
        self.num_windows += 1
        self.count += window.count
        if window.count:
            self._loss_sum += window.loss * window.count

    @property
    def loss(self) -> float:
        """Mean loss over all samples; NaN where there were none."""
        return self._loss_sum / self.count if self.count else math.nan

    def difference(self) -> dict[str, Tensor]:
        """What the local steps changed, whole and on the CPU. A collective where sharded."""
        changes = {}
        for name, parameter in self._parameters.items():
            dtype = payload_dtype(parameter.dtype)
            change = full_tensor(parameter.detach()).to(dtype) - full_tensor(self._start[name])
            changes[name] = change.to(dtype).cpu().contiguous()
        return changes


class OuterOptimizer:
    """Takes one step of SGD with Nesterov momentum on the donors' differences.

    Each head's is the mean of its donors', by their samples; the backbone's is the sum over heads.
    Every head's is multiplied by its weight, as its loss is in joint training.

    Args:
        shared: the parameters that differences come for; those that are frozen rest.
        weights: by head, the weight of its donors' loss.
        learning_rate: of the outer step; 1 without momentum takes a difference over as it is.
        momentum: of the outer step.
    """

    def __init__(
        self,
        shared: SharedParameters,
        weights: Mapping[str, float],
        learning_rate: float,
        momentum: float,
    ) -> None:
        self._trained, self._weights = shared.trained, dict(weights)
        self.optimizer = torch.optim.SGD(
            self._trained.values(), lr=learning_rate, momentum=momentum, nesterov=momentum > 0
        )

    def step(self, records: Sequence[Record]) -> dict[str, float]:
        """Apply one round's differences; alike on every rank. Gradients are left as they were.

        Returns:
            The norm of each donor's difference by tag.
        """
        counts: dict[str, float] = defaultdict(float)
        for record in records:
            counts[record.header.head] += record.header.count
        kept = {name: parameter.grad for name, parameter in self._trained.items()}
        for parameter in self._trained.values():
            parameter.grad = None
        metrics: dict[str, float] = {}
        for record in records:
            header = record.header
            share = self._weights[header.head] * header.count / counts[header.head]
            for name, parameter in self._trained.items():
                if name in record.tensors:
                    change = record.tensors[name].to(parameter.device, parameter.dtype)
                    gradient = shard_like(change, parameter) * -share
                    parameter.grad = (
                        gradient if parameter.grad is None else parameter.grad + gradient
                    )
            norm = math.sqrt(sum(record.squares.values()))
            metrics |= {
                f"gradient/{header.job} norm of weight change": norm,
                **validation_metrics(record),
            }
        self.optimizer.step()
        for name, parameter in self._trained.items():
            parameter.grad = kept[name]
        return metrics
