"""What teachers do in a receiver's training loop: who teaches when, and what it adds to the loss.

The gradient exchange keeps a donor's head out of the receiver's graph, a teacher puts it in. Under
DistributedDataParallel both are right at no cost, because DDP was built while the head required no
gradient: it never waits for it and never reduces it. While a teacher is at work the head requires
gradients, which ``WindowAccumulator.reduce_unmanaged_`` averages over the ranks; the backbone's, of
both losses, come from one backward through DDP.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from toolkit.bridge.accumulation import Window
from toolkit.bridge.config import BridgeConfig
from toolkit.bridge.errors import SchemaMismatchError
from toolkit.bridge.liveness import Wait
from toolkit.bridge.resting import Rest
from toolkit.bridge.teachers import Offer, Teachers
from toolkit.distillation import kl_loss, mse_loss
from toolkit.parameters import SharedParameters
from toolkit.sharding import is_sharded

logger = logging.getLogger(__name__)

LossFunction = Callable[[Tensor, Tensor], Tensor]


class Lessons:
    """Teachers at work in one receiver.

    The teachers of one head count for equal parts. In the gradient of both losses here that is one
    teacher that predicts their mean, as codistillation has it.

    Args:
        teachers: who may teach.
        shared: the receiver's tensors.
        config: the settings.
        loss_fn: of the student's and the teacher's logits, reduced as ``config.loss_reduction``; by
            default as ``config.distill_loss``.

    Attributes:
        taught_heads: the heads that have a teacher in the present window, alike on all ranks.
        were_asked: whether any rank asked for a loss in the newest closed window.

    Raises:
        ValueError: if ``config.donor_weight`` names heads, and not these.
    """

    def __init__(
        self,
        teachers: Teachers,
        shared: SharedParameters,
        config: BridgeConfig,
        loss_fn: LossFunction | None,
    ) -> None:
        self.teachers, self._shared, self._config = teachers, shared, config
        self._weights = config.weights_of(shared.heads)
        reduction = config.loss_reduction
        if loss_fn is None and config.distill_loss == "kl":
            loss_fn = functools.partial(
                kl_loss, temperature=config.temperature, reduction=reduction
            )
        self._loss_fn = loss_fn or functools.partial(mse_loss, reduction=reduction)
        self.taught_heads: tuple[str, ...] = ()
        self._fresh: dict[str, Tensor] = {}  # of the micro-batch that backward() has not seen yet
        self._sums: dict[str, Tensor] = {}
        self._num_losses = 0  # asked for in this window on this rank
        self.were_asked = False

    # -- who teaches --------------------------------------------------------------------------

    def begin(self, wait: Wait, name: str, rest: Rest) -> None:
        """Before the first step, and never again: give donors ``peer_wait`` to teach. A collective.

        Args:
            wait: for a donor, on the main process.
            name: of that donor.
            rest: of this job.

        Raises:
            SchemaMismatchError: if the newest weights are of another model.
            PeerError: if no weights come and ``require_peer`` is set.
        """
        teachers, config = self.teachers, self._config

        def poll() -> tuple[Offer | None] | None:
            is_due = wait.seconds >= config.peer_wait and not config.require_peer
            if not is_due and not teachers.is_looking and rest.lasts([wait]):
                return None
            if (offer := teachers.poll()) is not None:
                return (offer,)
            if teachers.misfit is not None:
                raise SchemaMismatchError(
                    f"{teachers.misfit}\nGive both jobs the same model settings, or "
                    "GradientReceiver a teacher_factory that makes the donor's model"
                )
            reason = wait.gave_up()
            if reason is None and is_due:
                reason = f"the {name} brought no weights for {config.peer_wait:g} s"
            if reason is not None:
                logger.warning("TRAINING ALONE: %s. No teacher, until one comes", reason)
            return (None,) if reason is not None else None

        while len(teachers.working) < config.num_donors:
            (offer,), _ = teachers.control.decide(poll)
            if offer is None:
                break
            teachers.begin(offer)
            teachers.take()
        rest.lasts(())  # nobody is waited for any more
        self._change()

    def stand_in(self, alone: Collection[str], trained: Mapping[str, int], step: int) -> None:
        """Exchange ``auto``: teach the heads whose donors are all away, and no others.

        Args:
            alone: these heads, the same on all ranks.
            trained: those that some donor has trained in this run, and the newest receiver step
                whose weights it did so at.
            step: the receiver's completed steps.

        Raises:
            BridgeError: on all ranks, if a teacher cannot be made.
        """
        is_main = self.teachers.control.is_main_process
        for head in self._shared.heads:
            was_alone = head in self.teachers.at_work
            if head in alone and not was_alone:
                if head in trained:
                    self.teachers.remember(head, self._shared.weights, step)
                if is_main:
                    teacher = "a teacher" if self.teachers.of(head) else "nothing, until one comes"
                    logger.warning(
                        "its donor is away: from receiver step %d on %s learns from %s",
                        step, head, teacher,
                    )  # fmt: skip
            elif was_alone and head not in alone:
                self.teachers.forget(head)
                logger.info("its donor is back: %s takes gradients from step %d on", head, step)
        self.teachers.at_work, self.teachers.trained = frozenset(alone), trained

    def end_window(self, was_skipped: bool) -> None:
        """Between two windows: look for newer weights. A collective, which never waits."""
        if not was_skipped:
            self.teachers.count_step()
        self.teachers.refresh()
        self._change()

    def end(self) -> None:
        """No teacher any more: take all heads out of the graph."""
        self.teachers.close()
        self.teachers.at_work = frozenset()
        self._change()

    def _change(self) -> None:
        """Put heads with a teacher into the graph, and take the others out of it."""
        self.taught_heads = self.teachers.heads
        for head, parameters in self._shared.heads.items():
            for parameter in parameters.values():
                if not is_sharded(parameter):  # FSDP2 does not wait for what gets no gradient
                    parameter.requires_grad_(head in self.taught_heads)

    # -- the loss -----------------------------------------------------------------------------

    def loss(self, head: str | None, logits: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        """Lambda times the mean over the head's teachers of their loss.

        Raises:
            ValueError: for a head left out where there are several.
            RuntimeError: for a head without a teacher at work.
        """
        if head is None:
            if len(self._weights) > 1:
                raise ValueError(f"teacher_loss(head=...) must be one of {list(self._weights)}")
            (head,) = self._weights
        if head not in self.taught_heads:
            raise RuntimeError(
                f"{head!r} has no teacher at work: ask for the losses of taught_heads only, now "
                f"{list(self.taught_heads)}"
            )
        teachers = self.teachers.of(head)
        losses = {donor: self._loss_fn(logits, t(*inputs)) for donor, t in teachers.items()}
        self._num_losses += 1
        self._fresh |= {donor: loss.detach().double() for donor, loss in losses.items()}
        return sum(losses.values(), logits.new_zeros(())) * (self._weights[head] / len(losses))

    def count(self, num_samples: float) -> None:
        """The micro-batch is back-propagated, with so many samples."""
        weight = num_samples if self._config.loss_reduction == "mean" else 1.0
        for donor, loss in self._fresh.items():
            self._sums[donor] = self._sums.get(donor, 0.0) + loss * weight
        self._fresh = {}

    def sums(self) -> list[float]:
        """What a window is closed with, once: how often a loss was asked for on this rank, and the
        losses, summed over samples, one for each teacher.
        """
        sums, self._sums = self._sums, {}
        count, self._num_losses = self._num_losses, 0
        return [count, *(float(sums.get(donor, 0.0)) for donor in self.teachers.working)]

    def metrics(self, window: Window) -> dict[str, float]:
        """Plain floats by tag, ``loss/own`` among them: the loss without the teachers' part.

        Args:
            window: closed with :meth:`sums`.
        """
        metrics, own = {}, window.loss
        count, *totals = window.extra_sums
        self.were_asked = count > 0
        for head in self._shared.heads:
            metrics[f"events/teacher {head} (0 or 1)"] = float(head in self.taught_heads)
        for (donor, working), total in zip(self.teachers.working.items(), totals, strict=True):
            head = working.offer.head
            if head in self.taught_heads and window.count:
                loss = total / window.count
                own -= self._weights[head] / len(self.teachers.of(head)) * loss
                metrics[f"loss/teacher {donor} (per sample)"] = loss
            metrics[f"bridge/teacher age {donor} (receiver steps)"] = float(working.age)
            metrics[f"bridge/teacher version {donor} (donor steps)"] = float(
                working.offer.donor_step
            )
        return {"loss/own (per sample)": own, **metrics}
