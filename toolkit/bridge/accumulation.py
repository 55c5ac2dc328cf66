"""Exact sums over an accumulation window, under Accelerate, DDP and FSDP2.

DDP and FSDP2 average the ranks' gradients and Accelerate divides each micro-step by the configured
number of accumulation steps. With ranks or micro-batches of unequal size, or a short last window,
the result is not the mean over the samples. Here what is back-propagated is the local SUM; after
the synchronised micro-step ``.grad`` is ``S / (W A c)`` with ``S`` the sum over the samples of the
whole window and all ranks, ``W`` the world size, ``A`` the configured accumulation steps and ``c``
a constant that keeps a scaled sum from overflowing. One factor makes it the exact sum or mean.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from toolkit.bridge.control import ControlGroup
from toolkit.bridge.rescaling import LossReduction
from toolkit.sharding import is_sharded, local_tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """One closed accumulation window.

    Attributes:
        count: samples in it, over ranks and micro-steps.
        loss: mean loss over ``count``; NaN where there were none.
        sum_factor: times ``.grad`` it is the gradient sum, in the loss scaler's domain.
        scale: the loss scale that ``.grad`` carries; 1.0 without a scaler.
        extra_sums: what :meth:`WindowAccumulator.close` was given, over ranks.
    """

    count: float
    loss: float
    sum_factor: float
    scale: float
    extra_sums: tuple[float, ...] = ()


class WindowAccumulator:
    """Back-propagates sums and counts samples until the gradients are synchronised.

    Args:
        accelerator: the job's accelerator.
        model: the prepared model; if FSDP2 has sharded it, it is resharded.
        control: the job's control group.
        loss_reduction: whether the loss given to :meth:`backward` is a mean or a sum.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        control: ControlGroup,
        loss_reduction: LossReduction,
    ) -> None:
        self._accelerator = accelerator
        self._model = model
        # Taken here: FSDP2 puts other tensors in their place while a forward needs them whole.
        self._parameters = list(model.parameters())
        # DDP leaves alone for ever what required no gradient when it was built, just before this.
        self._known_to_ddp = {id(p) for p in self._parameters if p.requires_grad}
        self._control = control
        self._loss_reduction = loss_reduction
        self._divisor: float | None = None
        self._count = 0.0
        self._loss_sum: Tensor | None = None
        self._must_close = False
        self._left_gradients = False
        self._synchronised_by_ddp = False

    @property
    def is_open(self) -> bool:
        """Whether a window has begun and is not closed yet."""
        return self._loss_sum is not None

    def backward(self, loss: Tensor, num_samples: float | Tensor) -> None:
        """Back-propagate one micro-batch in place of ``accelerator.backward(loss)``.

        Args:
            loss: scalar; the mean over ``num_samples`` (``loss_reduction="mean"``) or their sum.
            num_samples: this rank's samples (or tokens, or sum of weights) in the micro-batch;
                0 for an empty one, whose loss must then be finite.

        Raises:
            ValueError: if the loss is no scalar or the count is negative or not finite.
            RuntimeError: for a second call at a synchronised micro-step, which would count the
                samples twice, and where the window's earlier gradients have been cleared.
        """
        if self._must_close:
            raise RuntimeError(
                "a second backward() at a synchronised micro-step: add up the losses of a "
                "micro-batch and call backward() once, and then inject() (receiver) or publish() "
                "(donor)"
            )
        if loss.numel() != 1:
            raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}")
        count = float(num_samples)
        if not math.isfinite(count) or count < 0:
            raise ValueError(f"num_samples must be finite and not negative, got {count}")
        # Divide before multiplying: a half precision sum could overflow.
        weight = count if self._loss_reduction == "mean" else 1.0
        self._check_not_cleared()
        self._must_close = self._accelerator.sync_gradients
        self._synchronised_by_ddp = bool(getattr(self._model, "require_backward_grad_sync", False))
        self._accelerator.backward(loss * (weight / self._constant(count)))
        self._left_gradients = any(p.grad is not None for p in self._trained())
        self._count += count
        detached = loss.detach().double() * weight
        self._loss_sum = detached if self._loss_sum is None else self._loss_sum + detached

    def close(self, extra_sums: Sequence[float] = ()) -> Window:
        """End the window at the synchronised micro-step and count it over ranks. A collective.

        Args:
            extra_sums: further numbers to add up over ranks, of which each has as many.

        Raises:
            RuntimeError: if :meth:`backward` was never called in this window, or FSDP2 has not
                reduced its gradients.
        """
        if self._loss_sum is None:
            raise RuntimeError(
                "no backward() of the bridge in this accumulation window; call it in place of "
                "accelerator.backward()"
            )
        count, loss_sum, *extra = self._control.sum(
            [self._count, float(self._loss_sum), *extra_sums]
        )
        sharded = [p for p in self._trained() if is_sharded(p)]
        if count and sharded and all(p.grad is None for p in sharded):
            raise RuntimeError(
                "FSDP2 has reduced no gradient at the synchronised micro-step: leave "
                "set_requires_gradient_sync() to accelerator.accumulate(), or set it to True there"
            )
        scaler = self._accelerator.scaler
        scale = float(scaler.get_scale()) if scaler is not None else 1.0
        factor = (
            self._accelerator.num_processes
            * self._accelerator.gradient_accumulation_steps
            * (self._divisor or 1.0)
        )
        self._count, self._loss_sum, self._must_close = 0.0, None, False
        loss = loss_sum / count if count else math.nan
        return Window(count, loss, float(factor), scale, tuple(extra))

    def reduce_unmanaged_(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Average over ranks the gradients that DDP left local, as DDP would have. A collective.

        DDP leaves out parameters on its ignore list, those that required no gradient when it was
        built (a head that a teacher puts into the graph later), every parameter if the last
        backward ran under ``no_sync``, and a model that is not wrapped at all. What FSDP2 has
        sharded it has reduced.
        """
        world_size = self._accelerator.num_processes
        if world_size == 1:
            return
        ignored = set(getattr(self._model, "parameters_to_ignore", ()))
        unmanaged = [
            parameter
            for name, parameter in parameters
            if parameter.requires_grad
            and not is_sharded(parameter)
            and (
                name in ignored
                or id(parameter) not in self._known_to_ddp
                or not self._synchronised_by_ddp
            )
        ]
        if not unmanaged:
            return
        # A rank without samples may lack a gradient that the others have.
        present = self._control.sum([float(p.grad is not None) for p in unmanaged])
        for parameter, num_ranks in zip(unmanaged, present, strict=True):
            if num_ranks:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(world_size)

    def _check_not_cleared(self) -> None:
        """Notice a zero_grad() between the micro-steps of one window.

        FSDP2 keeps what it has not reduced yet out of ``.grad``, and out of reach.
        """
        left = self._left_gradients and self.is_open and self._count
        if left and all(p.grad is None for p in self._trained()):
            raise RuntimeError(
                "the gradients of this accumulation window's earlier micro-batches are gone, but "
                "their samples are counted: call zero_grad() after optimizer.step(), not before "
                "backward()"
            )

    def _trained(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self._parameters if parameter.requires_grad)

    def _constant(self, count: float) -> float:
        """A power of two near the first micro-batch's size where a loss scaler is at work."""
        if self._divisor is None:
            if self._accelerator.scaler is None:
                self._divisor = 1.0
            else:
                exponent = round(math.log2(max(count, 1.0)))
                self._divisor = self._control.on_main(lambda: 2.0**exponent)
        return self._divisor


def scale_grads_(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply the gradients that exist by ``factor``, in place."""
    grads = [local_tensor(p.grad) for p in parameters if p.grad is not None]
    if grads:
        torch._foreach_mul_(grads, factor)
