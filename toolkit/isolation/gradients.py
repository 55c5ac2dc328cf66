"""Gradients of one loss for one model, in a graph that runs through several."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from toolkit.graph import has_reentrant_checkpoint
from toolkit.isolation.checks import enumerate_names, unwrap

_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def backward_for(
    loss: Tensor,
    module: nn.Module,
    accelerator: Accelerator | None = None,
    *,
    retain_graph: bool = False,
) -> None:
    """Add the gradients of ``loss`` to the parameters of ``module``, and to no others.

    What only other models' gradients would need is not computed. DistributedDataParallel averages
    the gradients of ``module`` over the ranks as ever; those of a model that the graph merely runs
    through are neither computed nor sent.

    Args:
        loss: scalar, with a graph that reaches ``module``.
        module: a whole model, prepared or not. Its parameters without ``requires_grad`` are left
            out.
        accelerator: scales the loss for accumulation and mixed precision, as
            ``accelerator.backward(loss)`` does.
        retain_graph: keep the graph, for the backward of another loss that shares a part of it.

    Raises:
        ValueError: if the loss is no scalar or has no graph, if ``module`` has nothing to train or
            is no part of the graph, or if it is wrapped, sharded or checkpointed in a way that is
            not supported.
        RuntimeError: if a weight that the gradient depends on was changed after the forward.
    """
    if loss.numel() != 1:
        raise ValueError(
            f"loss must be a scalar, got shape {tuple(loss.shape)}; take a mean or sum"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"loss has no graph, so {_class_name(module)} gets no gradient from it: was it "
            "computed under torch.no_grad(), or from detached tensors only?"
        )
    _check_wrapping(module, accelerator)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(
            f"{_class_name(module)} has no parameter that requires a gradient: is it frozen?"
        )
    before = [_grad_version(parameter) for parameter in parameters]
    options: dict[str, Any] = {"inputs": parameters, "retain_graph": retain_graph}
    try:
        if accelerator is None:
            loss.backward(**options)
        else:
            accelerator.backward(loss, **options)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"the gradient for {_class_name(module)} depends on a tensor that was changed after "
            "the forward, most likely a weight of a model that was stepped meanwhile. Do this "
            "backward before that step, or that model's forward again after it"
        ) from error
    after = [_grad_version(parameter) for parameter in parameters]
    missed = [old == new for old, new in zip(before, after, strict=True)]
    if any(missed) and has_reentrant_checkpoint(loss):
        raise ValueError(
            f"an activation checkpoint hides parameters of {_class_name(module)}, which got no "
            "gradient: checkpoint with use_reentrant=False"
        )
    if all(missed):
        raise ValueError(
            f"loss does not depend on any parameter of {_class_name(module)}: did its forward run "
            "on a detached tensor, or through another copy of the model?"
        )


def _class_name(module: nn.Module) -> str:
    return type(unwrap(module)).__name__


def _grad_version(parameter: nn.Parameter) -> tuple[int, int] | None:
    """Differs before and after a backward that reached the parameter."""
    grad = parameter.grad
    return None if grad is None else (id(grad), grad._version)


def _check_wrapping(module: nn.Module, accelerator: Accelerator | None) -> None:
    """Refuse what would silently train on gradients that are not synchronised."""
    if any(isinstance(part, FSDPModule | FullyShardedDataParallel) for part in module.modules()):
        raise ValueError("models sharded by FSDP are not supported: use DistributedDataParallel")
    if accelerator is None:
        return
    if accelerator.distributed_type not in _SUPPORTED:
        raise ValueError(f"{accelerator.distributed_type.value} is not supported; use DDP")
    mine = set(module.parameters())
    for model in accelerator._models:
        if isinstance(model, DistributedDataParallel):
            all_of_it = {parameter for parameter in model.parameters() if parameter.requires_grad}
            if mine & all_of_it and not all_of_it <= mine:
                raise ValueError(
                    f"{type(module).__name__} is only a part of a model that "
                    "DistributedDataParallel wraps, whose gradients would not be synchronised: "
                    "give the whole model, or prepare the part by itself"
                )


class CutPoint:
    """Where the output of one model enters the next: one forward serves the losses of both.

    Args:
        output: of ``module``'s forward, with its graph; any shape. Several outputs: one cut is
            for one tensor, so concatenate them, or use ``backward_for`` and ``detach()``.
        module: the model that ``output`` comes from, and that :meth:`backward` trains.

    Raises:
        ValueError: if ``output`` has no graph.
    """

    def __init__(self, output: Tensor, module: nn.Module) -> None:
        if output.grad_fn is None:
            raise ValueError(
                "output has no graph: give CutPoint what the model returned, not a detached "
                "tensor, and run its forward outside torch.no_grad()"
            )
        self._output, self._version = output, output._version
        self._module, self._weights = module, _weight_versions(module)
        self._spent = False

    @property
    def detached(self) -> Tensor:
        """The output without its graph, for the loss of the next model; the same memory."""
        self._check()
        return self._output.detach()

    @property
    def attached(self) -> Tensor:
        """The output with its graph, for the loss of ``module`` itself."""
        self._check()
        return self._output

    def backward(self, loss: Tensor, accelerator: Accelerator | None = None) -> None:
        """Add the gradients of ``loss`` to ``module``'s parameters, and to no others. Once.

        Args:
            loss: scalar, computed from :attr:`attached`.
            accelerator: as for :func:`backward_for`.

        Raises:
            RuntimeError: at a second call, or if the output or a weight was changed meanwhile.
            ValueError: as :func:`backward_for` does, for a loss made from :attr:`detached` too.
        """
        self._check()
        backward_for(loss, self._module, accelerator)
        self._spent = True

    def _check(self) -> None:
        if self._spent:
            raise RuntimeError(
                "this cut has had its backward: sum the losses and call backward() once, and make "
                "a new CutPoint for every forward"
            )
        if self._output._version != self._version:
            raise RuntimeError(
                "the output was modified in place after the cut, for both losses: clone it first"
            )
        if _weight_versions(self._module) != self._weights:
            pairs = zip(self._weights, unwrap(self._module).named_parameters(), strict=True)
            moved = [name for version, (name, weight) in pairs if weight._version != version]
            raise RuntimeError(
                "weights were changed after the forward whose output this is (by a step?): "
                f"{enumerate_names(moved)}. Use the cut before the step, or make a new one after it"
            )


def _weight_versions(module: nn.Module) -> list[int]:
    # A fused optimizer, and anything that goes through `.data`, does not move these counters.
    return [parameter._version for parameter in module.parameters()]


@contextlib.contextmanager
def one_loss_scale(accelerator: Accelerator) -> Iterator[None]:
    """Let several optimizers step at one loss scale, which moves once, at the end of the block.

    ``AcceleratedOptimizer.step()`` moves the scale that all of them share. A gradient that another
    model already holds, from an accumulated micro-batch or a backward before both steps, is then
    unscaled by a scale that it was not taken at. Without a loss scaler (all but fp16), and between
    the steps of an accumulation window, the block does nothing.

    Args:
        accelerator: whose optimizers step in the block.
    """
    scaler: Any = accelerator.scaler
    if scaler is None:
        yield
        return
    held_back = []
    scaler.update = lambda: held_back.append(True)  # hides the method for the time of the block
    try:
        yield
    finally:
        del scaler.update
    if held_back:
        scaler.update()
