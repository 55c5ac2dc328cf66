"""Rotations together with a balance of the tasks' gradients: two ways to weigh them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.rotograd.history import History
from toolkit.rotograd.rotating import RotateOnly
from toolkit.rotograd.weighting import Statistics, gradnorm_weights, rotograd_weights


class RotoGrad(RotateOnly):
    """Rotations, and gradients of the same size for all tasks.

    The backbone gets C sum_k G_k / ||G_k||, where C is a mean of the norms in which tasks count by
    how little their gradients have shrunk since the first step.

    Source: Javaloy and Valera, RotoGrad: Gradient Homogenization in Multitask Learning,
    arXiv 2103.02631.

    Args:
        alpha: accepted so that one call serves this class and :class:`RotoGradNorm`; not used.

    The other arguments, and what it raises: as for :class:`RotateOnly`.
    """

    _weights_follow_norms = True

    def __init__(
        self,
        backbone: nn.Module,
        heads: Iterable[nn.Module],
        size_z: int,
        *,
        alpha: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(backbone, heads, size_z, **options)
        is_number = isinstance(alpha, numbers.Real) and not isinstance(alpha, bool)
        if not is_number or not math.isfinite(alpha):
            raise ValueError(f"alpha must be one finite number, got {alpha!r}")
        self.alpha = float(alpha)

    def _weigh(self, statistics: Statistics, history: History) -> tuple[Tensor, Tensor | None]:
        return rotograd_weights(statistics, history.initial_norms), None


class RotoGradNorm(RotoGrad):
    """Rotations, and trained weights of the tasks' gradients as in GradNorm.

    The backbone gets sum_k w_k G_k. The weights w = K softmax(raw) are trained so that w_k ||G_k||
    comes near T (l_k / mean l)^alpha, with l_k a task's loss over its first one: tasks that learn
    more slowly than others get more. With alpha other than 0, losses must be given through
    :meth:`total` or :meth:`backward`.

    Source: the package ``rotograd``; Chen et al., GradNorm, arXiv 1711.02257.

    Args:
        alpha: how strongly to balance the tasks' rates; 0 gives all gradients the same norm.

    Raises:
        RuntimeError: (in backward) if losses are needed and were not given.
        ValueError: (in backward) for a first loss of 0, or a negative one with a fractional alpha.
    """

    _weights_follow_norms = False

    def __init__(
        self,
        backbone: nn.Module,
        heads: Iterable[nn.Module],
        size_z: int,
        *,
        alpha: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(backbone, heads, size_z, alpha=alpha, **options)
        self.raw_weights = nn.Parameter(torch.zeros(len(self), dtype=self.rotations.matrices.dtype))

    @property
    def weights(self) -> Tensor:
        """(K,), w, which sum to K."""
        return len(self) * torch.softmax(self.raw_weights.detach(), 0)

    def rotation_parameters(self) -> list[nn.Parameter]:
        return [*super().rotation_parameters(), self.raw_weights]

    def _raw_weights(self) -> nn.Parameter | None:
        return self.raw_weights

    def _weigh(self, statistics: Statistics, history: History) -> tuple[Tensor, Tensor | None]:
        rates = self._rates(statistics, history) if self.alpha else None
        return gradnorm_weights(self.raw_weights.detach(), statistics, rates)

    def _rates(self, statistics: Statistics, history: History) -> Tensor:
        """(K,), (l_k / mean l)^alpha."""
        if statistics.losses is None:
            raise RuntimeError(
                "RotoGradNorm needs the losses' values: call backward on model.total([loss1, ...]) "
                "(toolkit.rotograd.total(model, [...]) for a prepared model), or alpha=0"
            )
        present, initial = statistics.present, history.initial_losses
        relative = torch.where(present, statistics.losses / initial, 0)
        relative = relative / (relative.sum() / statistics.num_present)
        checks = torch.stack([present & (initial == 0), present & (relative < 0)]).tolist()
        for index, (zero, negative) in enumerate(zip(*checks, strict=True)):
            if zero:
                raise ValueError(
                    f"the first loss of task {index} is 0, so that its rate l / l0 is undefined"
                )
            if negative and not self.alpha.is_integer():
                raise ValueError(
                    f"the loss of task {index} has changed its sign, which alpha={self.alpha} has "
                    "no power of: give losses that stay positive, or an integer alpha"
                )
        return torch.where(present, relative**self.alpha, 1)
