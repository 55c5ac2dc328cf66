"""Gradient accumulation as if the micro-batches of a window were one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from toolkit.graph import has_reentrant_checkpoint
from toolkit.rotograd.weighting import Statistics


class Window:
    """The micro-batches since gradients were last cleared.

    Norms, and so the weights of the tasks, change with every micro-batch. After each backward
    ``.grad`` is what one backward of all micro-batches so far would have left: what earlier ones
    left is corrected by the difference. For that the window keeps the gradients of the features of
    all its micro-batches, and for each task the sum of the backbone's gradients if weights change.

    Args:
        backbone: whose gradients are corrected.
        reweigh: whether the weights of the tasks depend on the norms.
    """

    def __init__(self, backbone: nn.Module, *, reweigh: bool) -> None:
        self._parameters = [one for one in backbone.parameters() if one.requires_grad]
        self._reweigh = reweigh
        self._statistics: list[Statistics] = []
        self._gradients: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._given: dict[str, Tensor] = {}
        self._task_grads: list[list[Tensor | None]] = []
        self._weights: Tensor | None = None

    def extend(
        self, statistics: Statistics, gradients: Tensor, rows: Tensor | None
    ) -> tuple[Statistics, Tensor, Tensor | None]:
        """Add a micro-batch; the same of the window, losses averaged over micro-batches.

        Args:
            statistics: of the micro-batch, over all ranks.
            gradients: (K, N, d), G_k of this rank.
            rows: (N, d), the features, if they are needed.
        """
        self._statistics.append(statistics)
        self._gradients.append(gradients)
        if rows is not None:
            self._rows.append(rows)
        losses = [one.losses for one in self._statistics if one.losses is not None]
        befores = [one.gram_before for one in self._statistics if one.gram_before is not None]
        total = Statistics(
            gram=torch.stack([one.gram for one in self._statistics]).sum(0),
            losses=torch.stack(losses).mean(0) if losses else None,
            num_rows=torch.stack([one.num_rows for one in self._statistics]).sum(),
            world_size=statistics.world_size,
            gram_before=torch.stack(befores).sum(0) if befores else None,
        )
        return total, torch.cat(self._gradients, 1), torch.cat(self._rows) if self._rows else None

    def rest(self, name: str, gradient: Tensor | None) -> Tensor | None:
        """The window's gradient of what ``name`` is for, less what earlier micro-batches gave."""
        if gradient is None:
            return None
        given, self._given[name] = self._given.get(name), gradient
        return gradient if given is None else gradient - given

    def correct(self, weights: Tensor, features: Tensor, gradients: Tensor) -> None:
        """Bring the backbone's ``.grad`` of earlier micro-batches to the window's present weights.

        Args:
            weights: (K,), of the tasks.
            features: (N, d), this micro-batch's, with their graph.
            gradients: (K, N, d), this micro-batch's G_k.

        Raises:
            ValueError: if a reentrant checkpoint hides parameters of the backbone.
        """
        if not self._reweigh:
            return
        before, self._weights = self._weights, weights
        if before is None and has_reentrant_checkpoint(features):
            raise ValueError(
                "exact_accumulation takes the backbone's gradients task by task, which an "
                "activation checkpoint hides: checkpoint with use_reentrant=False"
            )
        if before is not None:
            for change, task in zip(weights - before, self._task_grads, strict=True):
                for parameter, grad in zip(self._parameters, task, strict=True):
                    if grad is not None and parameter.grad is not None:
                        parameter.grad += change * grad
        found = [self._backbone_gradients(features, one) for one in gradients.to(features.dtype)]
        if before is not None:
            found = [_sums(*pair) for pair in zip(self._task_grads, found, strict=True)]
        self._task_grads = found

    def _backbone_gradients(self, features: Tensor, gradient: Tensor) -> list[Tensor | None]:
        return list(
            torch.autograd.grad(
                features, self._parameters, gradient, retain_graph=True, allow_unused=True
            )
        )


def _sums(tensors: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> list[Tensor | None]:
    pairs = zip(tensors, others, strict=True)
    return [b if a is None else a if b is None else a + b for a, b in pairs]
