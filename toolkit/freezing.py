"""Layers that rest while others train, under every optimizer that steps each parameter by itself.

.. code-block:: python

    with frozen(model, "hidden_task2", optimizer=optimizer):
        loss(model, batch_of_task1).backward()
        optimizer.step()

The optimizers of torch step a parameter if and only if its ``grad`` is not None when ``step()`` is
called. ``requires_grad_(False)`` does not see to that: an old gradient stays where it is, and zero
is a gradient too, with which Adam goes on along its moments and weight decay goes on shrinking.
``lr = 0`` moves the moments. So here the gradients of frozen parameters are dropped at the end of
every backward pass, after DistributedDataParallel has written them and before anything unscales,
clips or steps. The graph stays as it is, which is what DistributedDataParallel relies on.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.autograd import Variable
from torch.optim import Optimizer

from toolkit.freezing_checks import (
    check_gradients_averaged,
    check_gradients_not_needed,
    check_in_optimizers,
    check_ranks_agree,
    check_wrappers,
    innermost_optimizers,
)
from toolkit.optimizer_state import complete_state, forget_state
from toolkit.selection import Selection, Target, listed, select

__all__ = ["Freezing", "freeze", "frozen", "has_gradients", "unfreeze"]

_ACTIVE: weakref.WeakSet[Freezing] = weakref.WeakSet()


class Freezing:
    """A frozen part of a model. Made by :func:`freeze`, ended by :func:`unfreeze`.

    Register it with ``accelerator.register_for_checkpointing`` where the loop does not itself
    know after a resume whether the part is frozen.

    Attributes:
        names: the parameters, by plain name.
        is_active: whether they are frozen now.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        optimizers: Sequence[Optimizer],
        requires_grad: bool,
    ) -> None:
        self.names = list(selection.parameters)
        self.is_active = False
        self._model = model
        self._plain_model = extract_model_from_parallel(model, keep_torch_compile=False)
        self._selection = selection
        self._optimizers = list(optimizers)
        self._requires_grad = requires_grad
        self._parameters = list(selection.parameters.values())
        # cuDNN computes no gradients for a recurrent layer in eval mode.
        self._modules = [m for m in selection.modules.values() if not isinstance(m, nn.RNNBase)]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: the names, and whether they are frozen now."""
        return {"names": self.names, "is_active": self.is_active}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Freeze or unfreeze as it was in a checkpoint. Optimizer state is left alone.

        Raises:
            ValueError: if other parameters were frozen in the checkpoint, or if some of these are
                frozen already by another freezing.
        """
        frozen: bool = state["is_active"]
        if frozen and state["names"] != self.names:
            raise ValueError(
                f"the checkpoint has frozen {listed(state['names'])}, this freezing is of "
                f"{listed(self.names)}: freeze the same parameters before loading"
            )
        if self.is_active and not frozen:
            self._release()
        elif frozen and not self.is_active:
            self._hold()

    def _hold(self) -> None:
        """Begin to freeze."""
        _check_no_overlap(self._selection)
        self.is_active = True
        _ACTIVE.add(self)
        self._drop_gradients()
        self._switched_off: list[nn.Parameter] = []
        if not self._requires_grad:
            self._switched_off = [param for param in self._parameters if param.requires_grad]
            for parameter in self._switched_off:
                parameter.requires_grad_(False)
        self._mode = self._plain_model.training
        self._modes = [module.training for module in self._modules]
        # Before other hooks, some of which look at the mode. The model's own hook is for code that
        # was compiled before the others existed, and for layers whose forward is called directly.
        _to_eval_mode(self._modules)
        pairs = [(self._model, self._modules), *((module, [module]) for module in self._modules)]
        handles: list[Any] = [
            module.register_forward_pre_hook(functools.partial(_to_eval_mode, held), prepend=True)
            for module, held in pairs
        ]
        # All parameters of the model: where the ranks use different layers, this rank's backward
        # may reach none of the frozen ones and still get their gradients from another rank.
        for parameter in self._plain_model.parameters():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(self._on_gradient)
                handles.append(hook)
        handles += [opt.register_step_pre_hook(self._before_step) for opt in self._optimizers]
        self._backward = -1  # the backward pass whose end is already waited for
        self._handles = handles

    def _release(self) -> None:
        """End to freeze, without asking the other ranks."""
        self.is_active = False
        _ACTIVE.discard(self)
        for handle in self._handles:
            handle.remove()
        self._drop_gradients()
        for parameter in self._switched_off:
            parameter.requires_grad_(True)
        # Modules in another mode than the model, by the user's will, have theirs again. Of a model
        # that is frozen as a whole, train() and eval() have left no trace.
        whole = any(module is self._plain_model for module in self._modules)
        mode = self._mode if whole else self._plain_model.training
        for module, before in zip(self._modules, self._modes, strict=True):
            module.training = mode if before == self._mode else before
        for optimizer in self._optimizers:
            complete_state(optimizer, self._parameters)

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _on_gradient(self, parameter: torch.Tensor) -> None:
        """Have the gradients dropped when this backward pass ends.

        DistributedDataParallel queues its callback, which writes the averaged gradients, while the
        pass runs; one that is queued by a callback comes after it.
        """
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            queue = Variable._execution_engine.queue_callback
            queue(lambda: queue(self._drop_gradients))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The last moment to prevent a step that moves what is frozen, or breaks the ranks apart.

        Optimizers take what such a hook returns as their new arguments, so it returns nothing.
        """
        check_in_optimizers(self._selection, self._optimizers)
        check_gradients_averaged(self._model, self._selection)
        self._drop_gradients()


def freeze(
    model: nn.Module,
    *targets: Target,
    optimizer: Optimizer | Sequence[Optimizer],
    requires_grad: bool = True,
) -> Freezing:
    """Let a part of a model rest: parameters, optimizer state and buffers stay bit by bit.

    Their present gradients are dropped, so freeze at the end of an accumulation window, not inside
    one. Frozen modules (all of whose parameters are frozen) are in eval mode, whatever
    ``model.train()`` says, so that BatchNorm's statistics rest too and dropout is off; recurrent
    layers keep their mode, as cuDNN wants it. All else trains as if the frozen part had no
    gradients. A collective: every rank calls it.

    Args:
        model: as it is called in the loop: prepared, wrapped, compiled or plain.
        targets: names of parameters or modules without a wrapper's prefix, patterns of names
            (``"hidden_task2.*"``), modules, parameters.
        optimizer: the one that steps them, prepared or not, or all of these.
        requires_grad: False spares the backward pass the frozen part, where nothing relies on its
            gradients: on one process, or under DistributedDataParallel with
            ``find_unused_parameters``.

    Returns:
        What :func:`unfreeze` takes.

    Raises:
        TypeError: for a target or an optimizer of another type.
        ValueError: for a target that the model does not have, a parameter that no given optimizer
            holds or that is frozen already, ``requires_grad=False`` where it is unsafe, a wrapper
            or an optimizer that cannot do without some gradients, and for targets that differ
            between ranks.
    """
    try:
        optimizers = innermost_optimizers(optimizer)
        check_wrappers(model)
        plain = extract_model_from_parallel(model, keep_torch_compile=False)
        selection = select(plain, [plain if target is model else target for target in targets])
        check_in_optimizers(selection, optimizers)
        _check_no_overlap(selection)
        if not requires_grad:
            check_gradients_not_needed(model, selection)
    except (TypeError, ValueError) as error:
        check_ranks_agree(f"error: {error}")
        raise
    check_ranks_agree(f"freeze {listed(list(selection.parameters))}", list(selection.parameters))
    freezing = Freezing(model, selection, optimizers, requires_grad)
    freezing._hold()
    return freezing


def unfreeze(freezing: Freezing, *, reset_state: bool = False) -> None:
    """Let a frozen part train again. A collective: every rank calls it.

    Args:
        freezing: from :func:`freeze`.
        reset_state: forget the moments from before the freezing, which point where the loss fell
            then; the optimizer begins anew with these parameters.

    Raises:
        ValueError: if it is not frozen now, or is not unfrozen on all ranks.
    """
    if not freezing.is_active:
        raise ValueError(f"not frozen now: {listed(freezing.names)}")
    check_ranks_agree(f"unfreeze {listed(freezing.names)}", freezing.names)
    freezing._release()
    if reset_state:
        for optimizer in freezing._optimizers:
            forget_state(optimizer, freezing._parameters)
            complete_state(optimizer, freezing._parameters)


@contextlib.contextmanager
def frozen(
    model: nn.Module,
    *targets: Target,
    optimizer: Optimizer | Sequence[Optimizer],
    requires_grad: bool = True,
    reset_state: bool = False,
) -> Iterator[Freezing]:
    """:func:`freeze` on entry and :func:`unfreeze` at the end of a ``with`` block.

    The block must hold the backward passes and the step. Blocks may be nested if they freeze
    different parameters.
    """
    freezing = freeze(model, *targets, optimizer=optimizer, requires_grad=requires_grad)
    try:
        yield freezing
    except BaseException:
        if freezing.is_active:
            freezing._release()  # the other ranks may be elsewhere: no collective
        raise
    if freezing.is_active:
        unfreeze(freezing, reset_state=reset_state)


def has_gradients(optimizer: Optimizer) -> bool:
    """Whether a step would do anything.

    ``GradScaler`` fails with "No inf checks were recorded" for an optimizer all of whose parameters
    are frozen: ``if has_gradients(optimizer): scaler.step(optimizer)``. So does its ``update()``
    after no step at all, and ``optimizer.step()`` of Accelerate under fp16. Without a scaler it is
    not needed.
    """
    return any(
        param.grad is not None for group in optimizer.param_groups for param in group["params"]
    )


def _to_eval_mode(modules: Sequence[nn.Module], *hook_args: Any) -> None:
    """Part of a forward pre-hook: ``model.train()`` reaches frozen modules too."""
    for module in modules:
        module.training = False


def _check_no_overlap(selection: Selection) -> None:
    held = {id(part) for other in _ACTIVE for part in [*other._parameters, *other._modules]}
    taken = [name for name, param in selection.parameters.items() if id(param) in held]
    if taken := taken or [name for name, part in selection.modules.items() if id(part) in held]:
        raise ValueError(
            f"frozen already: {listed(taken)}. Unfreeze the other freezing first, or leave them out"
        )
