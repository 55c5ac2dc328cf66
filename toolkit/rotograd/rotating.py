"""A rotation for each task, between the backbone and its head."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from toolkit.rotograd.accumulation import Window
from toolkit.rotograd.gradients import Noted, Rotate, num_ranks, sum_over_ranks
from toolkit.rotograd.history import History, reference
from toolkit.rotograd.multitask import VanillaMTL, sum_of
from toolkit.rotograd.rotations import Rotation, Rotations, as_rows, rotate
from toolkit.rotograd.steps import watch
from toolkit.rotograd.weighting import Statistics

_STEPS_PER_MEND = 8
_MOST_BACKWARDS = 1000  # for one step, before something seems to be wrong
_Model = TypeVar("_Model", bound="RotateOnly")


class RotateOnly(VanillaMTL):
    """Each head sees the features through a rotation of its own, which aligns the tasks' gradients.

    An ordinary module: ``accelerator.backward(sum(losses))``, once for each forward, does it all.
    In training, a task's loss reaches its head and, turned back, the backbone; the rotations get
    the gradient that aligns (see :mod:`toolkit.rotograd.gradients`). In evaluation the heads see
    the rotated features and nothing else is different. Steps are counted by the optimizer that
    holds :meth:`rotation_parameters`.

    Under DistributedDataParallel everything is measured on the global batch, the processes of which
    must be all that there are. Every rank must run the same backward passes, and what DDP asks for
    holds: no head without a gradient, so that an absent task's prediction is to be added with a
    factor of 0. Sharded models and optimizers (FSDP, ZeRO) are not supported.

    Attributes:
        rotations: the rotations and their trained tangents.
        coop_enabled: see :meth:`coop`.
        measure_before_rotation: let :meth:`measures` tell how the gradients agreed before, too.

    Args:
        backbone: returns features, or a tuple or list that begins with them.
        heads: one module for each task.
        size_z: d, the size of the features' last dimension, or of all but the first together.
        size_rotation: rotate the first so many features only; all of them by default.
        burn_in_period: optimizer steps after which first losses and norms are taken anew.
        init: "identity" leaves the outputs of a pretrained model as they are; or "random".
        normalize_losses: have :meth:`total` divide each loss by its first one.
        exact_accumulation: measure accumulated micro-batches as one batch, instead of each by
            itself. It costs a backward of the backbone for each task (in :class:`RotoGrad` only),
            their sums, and the features' gradients of all micro-batches.

    Raises:
        ValueError: for sizes that do not fit, an unknown ``init``, or no heads.
    """

    _weights_follow_norms = False

    def __init__(
        self,
        backbone: nn.Module,
        heads: Iterable[nn.Module],
        size_z: int,
        *,
        size_rotation: int | None = None,
        burn_in_period: int = 20,
        init: Literal["identity", "random"] = "identity",
        normalize_losses: bool = False,
        exact_accumulation: bool = False,
    ) -> None:
        super().__init__(backbone, heads)
        size = size_z if size_rotation is None else size_rotation
        if size > size_z:
            raise ValueError(f"size_rotation is {size}, but there are only {size_z} features")
        if not isinstance(burn_in_period, int) or burn_in_period < 0:
            raise ValueError(f"burn_in_period must be a number of steps, got {burn_in_period!r}")
        self.size_z, self.burn_in_period = size_z, burn_in_period
        self.normalize_losses = normalize_losses
        self.exact_accumulation = exact_accumulation
        self.rotations = Rotations(len(self), size, init)
        self.coop_enabled = self.measure_before_rotation = False
        self._history = History.empty(len(self))
        self._losses: Tensor | None = None
        self._slope: Tensor | None = None
        self._last: tuple[Statistics, Tensor, Tensor | None] | None = None
        self._pending: History | None = None
        self._num_backwards = 0  # since the last step
        self._window: Window | None = None

    @property
    def completed_steps(self) -> int:
        """Optimizer steps so far, each counted when it really happened."""
        return self._history.step

    def coop(self: _Model, value: bool = True) -> _Model:
        """Let each task's own loss turn its rotation too, with the same say as the alignment.

        For the end of a training, when the rotations need no longer keep the tasks apart. Under
        DistributedDataParallel it costs an all-reduce of twice the rotations' size per backward.
        """
        self.coop_enabled = value
        return self

    def requires_grad_(self: _Model, requires_grad: bool = True) -> _Model:
        """As for any module, but that the rotations' matrices stay frozen: tangents move them."""
        super().requires_grad_(requires_grad)
        self.rotations.matrices.requires_grad_(False)
        return self

    def rotation_parameters(self) -> list[nn.Parameter]:
        return [self.rotations.tangents]

    def features_of(self, features: Tensor) -> Sequence[Tensor]:
        rows = as_rows(features, self.size_z)
        matrices, tangents = self.rotations.matrices.detach(), self.rotations.tangents
        if self.training and torch.is_grad_enabled():
            watch(self)
            rotated = Rotate.apply(rows, tangents, self._raw_weights(), matrices, self)
        else:
            rotated = rotate(rows, matrices)
        return [one.view(features.shape) for one in rotated]

    def rotation_of(self, index: int) -> nn.Module:
        return Rotation(self.rotations.matrices[index], self.size_z)

    def total(self, losses: Sequence[Tensor | None]) -> Tensor:
        """The sum of the losses, each divided by its first one if ``normalize_losses`` is set.

        In its backward it also notes their values, which :class:`RotoGradNorm` needs, and what a
        loss scaler multiplied them by, which the first norms of a task that comes late need:
        ``sum(losses)`` does as well as this only where none of this is the case.

        Raises:
            ValueError: as :meth:`VanillaMTL.total` does, or for a first loss of 0 to divide by.
            RuntimeError: for losses with a graph in eval mode, which trains no rotations.
        """
        self.check_losses(losses)
        values = None
        if not self.training and any(loss is not None and loss.requires_grad for loss in losses):
            raise RuntimeError(
                "the model is in eval mode, where rotations get no gradient and tasks are not "
                "balanced: call model.train() before the forward, and model.backbone.eval() after "
                "it if need be; an evaluation belongs under torch.no_grad()"
            )
        if self.training and torch.is_grad_enabled():
            zero = self.rotations.matrices.new_zeros(())
            values = torch.stack(
                [zero if loss is None else loss.detach().to(zero).reshape(()) for loss in losses]
            )
        if self.normalize_losses:
            initial = self._initial_losses(losses, values)
            losses = [
                None if loss is None else loss / first
                for loss, first in zip(losses, initial, strict=True)
            ]
        total = sum_of(losses)
        return total if values is None else Noted.apply(total, values, self)

    def _initial_losses(self, losses: Sequence[Tensor | None], now: Tensor | None) -> Tensor:
        history = self._history
        initial = history.initial_losses.to(self.rotations.matrices)
        again = history.step == self.burn_in_period
        if now is not None and (again or bool(initial.isnan().any())):
            present = now.new_tensor([loss is not None for loss in losses])
            sums = sum_over_ranks(torch.stack([now, present]))
            initial = reference(initial, sums[0] / num_ranks(), sums[1] > 0, again=again)
        for index, (loss, first) in enumerate(zip(losses, initial.tolist(), strict=True)):
            if loss is not None and first == 0:
                raise ValueError(f"the first loss of task {index} is 0, and cannot normalise it")
        return initial.nan_to_num(1.0)

    # What the node between backbone and heads asks for.

    def _raw_weights(self) -> nn.Parameter | None:
        return None

    def note(self, losses: Tensor, slope: Tensor) -> None:
        self._losses, self._slope = losses, slope

    def given_losses(self) -> Tensor | None:
        losses, self._losses = self._losses, None
        return losses

    def open_window(self) -> Window | None:
        if not self.exact_accumulation:
            return None
        reached_last = [self.rotations.tangents, *self.backbone.parameters()]
        if not any(one.grad is not None and bool(one.grad.any()) for one in reached_last):
            self._window = None  # gradients were cleared: a step or a skipped one has passed
        if self._window is None:
            self._window = Window(self.backbone, reweigh=self._weights_follow_norms)
        return self._window

    def weigh(self, statistics: Statistics) -> tuple[Tensor, Tensor | None]:
        self._num_backwards += 1
        if self._num_backwards == _MOST_BACKWARDS:
            warnings.warn(
                f"{_MOST_BACKWARDS} backward passes without a step of an optimizer that holds "
                "model.rotation_parameters(): rotations do not turn, and first losses and norms "
                "are not kept. Make it from model.param_groups(...); sharded ones do not work",
                stacklevel=2,
            )
        norms, present = statistics.norms, statistics.present
        again, history = self._history.step == self.burn_in_period, self._history
        initial_norms = history.initial_norms.to(norms)
        initial_losses = history.initial_losses.to(norms)
        slope, self._slope = self._slope, None
        if again or not history.complete:
            own_norms = norms if slope is None else norms / slope.to(norms)
            initial_norms = reference(initial_norms, own_norms, present, again=again)
            if statistics.losses is not None:
                initial_losses = reference(initial_losses, statistics.losses, present, again=again)
            if self._pending is not None:  # a task that only an earlier micro-batch had
                earlier_norms = self._pending.initial_norms.to(norms)
                earlier_losses = self._pending.initial_losses.to(norms)
                initial_norms = torch.where(present, initial_norms, earlier_norms)
                initial_losses = torch.where(present, initial_losses, earlier_losses)
        self._pending = History(history.step + 1, initial_norms, initial_losses, history.complete)
        weights, raw_grad = self._weigh(statistics, self._pending)
        self._last = (statistics, weights, slope)
        return weights, raw_grad

    def _weigh(self, statistics: Statistics, history: History) -> tuple[Tensor, Tensor | None]:
        return torch.ones_like(statistics.norms), None

    # What the hook on optimizers calls.

    def held_parameter(self) -> nn.Parameter:
        return self.rotations.tangents

    def after_step(self, *, skipped: bool) -> None:
        pending, self._pending, self._window = self._pending, None, None
        self._num_backwards = 0
        if skipped:
            return
        self.rotations.fold(mend=self._history.step % _STEPS_PER_MEND == 0)
        if pending is None or self._last is None or not self._last[0].gram.isfinite().all():
            return
        pending.note_completeness()
        self._history = pending

    def get_extra_state(self) -> Tensor:
        coop = torch.tensor([float(self.coop_enabled)], dtype=torch.float64)
        return torch.cat([coop, self._history.to_tensor()])

    def set_extra_state(self, state: Tensor) -> None:
        if len(state) != 2 + 2 * len(self):
            tasks = (len(state) - 2) // 2
            raise ValueError(f"the checkpoint has {tasks} tasks, this model has {len(self)}")
        self.coop_enabled = bool(state[0])
        self._history = History.from_tensor(state[1:])
        self._pending = self._losses = self._slope = self._window = None

    def measures(self) -> dict[str, float]:
        """How the tasks' gradients agreed in the last backward, by names fit for TensorBoard.

        ``grad_norm/<task>``, ``weight/<task>``, ``cosine/<task>_<task>`` of the gradients that
        reach the backbone, ``cosine_before/<task>_<task>`` before they are turned back if
        ``measure_before_rotation`` is set, and ``orthogonality_error``. Computed at this call.
        Norms are without the loss scale if the backward was that of :meth:`total`. Empty before
        the first backward.
        """
        if self._last is None:
            return {}
        statistics, weights, slope = self._last
        norms = statistics.norms if slope is None else statistics.norms / slope.to(statistics.norms)
        result = {f"grad_norm/{k}": norm for k, norm in enumerate(norms.tolist())}
        result |= {f"weight/{k}": weight for k, weight in enumerate(weights.tolist())}
        for name, gram in (("", statistics.gram), ("_before", statistics.gram_before)):
            if gram is not None:
                norms = gram.diagonal().sqrt()
                cosines = (gram / torch.outer(norms, norms)).nan_to_num(0.0).tolist()
                for j in range(len(self)):
                    result |= {f"cosine{name}/{j}_{k}": cosines[j][k] for k in range(j)}
        return {**result, "orthogonality_error": self.rotations.orthogonality_error()}
