"""What a receiver's teachers add to its loss, and what is told of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from toolkit.bridge.accumulation import Window
from toolkit.bridge.config import BridgeConfig
from toolkit.bridge.teachers import Teachers
from toolkit.distillation import kl_loss, mse_loss

LossFunction = Callable[[Tensor, Tensor], Tensor]


class Lessons:
    """Distillation losses of the present window, by head and donor.

    The teachers of one head count for equal parts. In the gradient of both losses here that is one
    teacher that predicts their mean, as codistillation has it.

    Args:
        teachers: who teaches.
        config: the settings of the loss.
        weights: by head, lambda.
        loss_fn: of the student's and the teacher's logits, reduced as ``config.loss_reduction``; by
            default as ``config.distill_loss``.
    """

    def __init__(
        self,
        teachers: Teachers,
        config: BridgeConfig,
        weights: Mapping[str, float],
        loss_fn: LossFunction | None,
    ) -> None:
        self._teachers, self._weights = teachers, dict(weights)
        self._takes_mean = config.loss_reduction == "mean"
        reduction = config.loss_reduction
        if loss_fn is None and config.distill_loss == "kl":
            loss_fn = functools.partial(
                kl_loss, temperature=config.temperature, reduction=reduction
            )
        self._loss_fn = loss_fn or functools.partial(mse_loss, reduction=reduction)
        self._fresh: dict[str, Tensor] = {}  # of the micro-batch that backward() has not seen yet
        self._sums: dict[str, Tensor] = {}

    def loss(self, head: str, logits: Tensor, inputs: tuple[object, ...]) -> Tensor:
        """Lambda times the mean over the head's teachers of their loss."""
        teachers = self._teachers.of(head)
        losses = {donor: self._loss_fn(logits, t(*inputs)) for donor, t in teachers.items()}
        self._fresh |= {donor: loss.detach().double() for donor, loss in losses.items()}
        return sum(losses.values(), logits.new_zeros(())) * (self._weights[head] / len(losses))

    def count(self, num_samples: float) -> None:
        """The micro-batch is back-propagated, with so many samples."""
        weight = num_samples if self._takes_mean else 1.0
        for donor, loss in self._fresh.items():
            self._sums[donor] = self._sums.get(donor, 0.0) + loss * weight
        self._fresh = {}

    def sums(self) -> list[float]:
        """The window's losses on this rank, summed over samples, one for each teacher; once."""
        sums, self._sums = self._sums, {}
        return [float(sums.get(donor, 0.0)) for donor in self._teachers.working]

    def metrics(self, window: Window, taught_heads: Sequence[str]) -> dict[str, float]:
        """Plain floats by tag, ``loss/own`` among them: the loss without the teachers' part.

        Args:
            window: closed with :meth:`sums`.
            taught_heads: the heads that had a teacher in it.
        """
        metrics, own = {}, window.loss
        for (donor, working), total in zip(
            self._teachers.working.items(), window.extra_sums, strict=True
        ):
            head = working.offer.head
            if head in taught_heads and window.count:
                loss = total / window.count
                own -= self._weights[head] / len(self._teachers.of(head)) * loss
                metrics[f"loss/teacher {donor} (per sample)"] = loss
            metrics[f"teacher/{donor} age (receiver steps)"] = float(working.age)
            metrics[f"teacher/{donor} donor step"] = float(working.offer.donor_step)
        return {"loss/own (per sample)": own, **metrics}
