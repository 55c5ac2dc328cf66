"""How much of each task's gradient the backbone gets: scalars only."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What one backward says about its K tasks, over the whole global batch.

    Attributes:
        gram: (K, K), the inner products <G_j, G_k> of the tasks' gradients with respect to the
            features. A task that was absent, or whose gradient is 0, has zeros.
        losses: (K,), the losses if they were given; 0 for an absent task.
        num_rows: feature vectors in the batch, a scalar tensor.
        world_size: ranks that the batch is spread over.
        gram_before: (K, K), the same before the rotations were undone; only if asked for.
    """

    gram: Tensor
    losses: Tensor | None
    num_rows: Tensor
    world_size: int
    gram_before: Tensor | None = None

    @functools.cached_property
    def norms(self) -> Tensor:
        """(K,), ||G_k||."""
        return self.gram.diagonal().sqrt()

    @functools.cached_property
    def inverse_norms(self) -> Tensor:
        """(K,), 1 / ||G_k||; 0 for an absent task."""
        return inverse(self.norms)

    @functools.cached_property
    def num_present(self) -> Tensor:
        """Tasks that are present, at least 1."""
        return self.present.sum().clamp(min=1)

    @functools.cached_property
    def present(self) -> Tensor:
        """(K,), whether the task has a gradient here."""
        return self.gram.diagonal() != 0


def inverse(values: Tensor) -> Tensor:
    """1 / values, and 0 where they are 0."""
    return torch.where(values == 0, 0, 1 / values)


def rotograd_weights(statistics: Statistics, initial: Tensor) -> Tensor:
    """Factors C / n_k that give all tasks the same share, C = sum_k a_k n_k.

    a_k = (n_k / n0_k) / sum_i (n_i / n0_i): tasks whose gradients have shrunk less since n0 say how
    long the step is. Paper, equations 6 and 7. All factors 0 if all norms are.

    Args:
        statistics: of this backward.
        initial: (K,), n0_k.
    """
    norms = statistics.norms
    ratios = torch.where(statistics.present, norms / initial, 0)
    return ratios @ norms * inverse(ratios.sum()) * statistics.inverse_norms


def gradnorm_weights(
    raw: Tensor, statistics: Statistics, rates: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights w = K softmax(raw) and the gradient for raw of sum_k | w_k n_k - target_k |.

    target_k = T (l_k / mean l)^alpha is held constant, with T = ||mean_k w_k G_k||, means over the
    tasks that are present. With s_k = sign(w_k n_k - target_k) n_k and p = softmax(raw), the chain
    rule through the softmax gives w_k (s_k - sum_j p_j s_j).

    Args:
        raw: (K,).
        statistics: of this backward.
        rates: (K,), (l_k / mean l)^alpha; None for all 1.
    """
    shares = torch.softmax(raw.to(statistics.gram), 0)
    weights = len(raw) * shares
    present = statistics.present
    total = (weights @ statistics.gram @ weights).clamp(min=0).sqrt() / statistics.num_present
    targets = total if rates is None else total * rates
    norms = statistics.norms
    slopes = torch.where(present, torch.sign(weights * norms - targets) * norms, 0)
    return weights, weights * (slopes - (shares * slopes).sum())
