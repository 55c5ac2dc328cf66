"""A backbone and a head for each task: what all ways to train them have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn


class VanillaMTL(nn.Module):
    """Several tasks that share a backbone and are trained by the sum of their losses.

    The baseline, and the base of the classes with rotations. ``model(...)`` calls the backbone with
    all arguments and returns the list of the heads' predictions. If the backbone returns a tuple or
    list, its first item are the features and ``model(...)`` returns (predictions, other items).
    ``model[i]`` is the model of one task, from inputs to prediction.

    Attributes:
        backbone: the shared part.
        heads: one module for each task, called with the features.

    Args:
        backbone: becomes a submodule, as the heads do: ``model.parameters()`` are all parameters.
        heads: at least one, in any iterable.

    Raises:
        ValueError: without heads.
    """

    def __init__(self, backbone: nn.Module, heads: Iterable[nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(heads)
        if not self.heads:
            raise ValueError("heads is empty: give one module for each task")

    def __len__(self) -> int:
        return len(self.heads)

    def __getitem__(self, index: int) -> SingleTask:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} tasks, no task {index}")
        index %= len(self)
        return SingleTask(self.backbone, self.rotation_of(index), self.heads[index])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        features, extras = split_extras(self.backbone(*args, **kwargs))
        predictions = [
            head(one) for head, one in zip(self.heads, self.features_of(features), strict=True)
        ]
        return predictions if extras is None else (predictions, extras)

    def features_of(self, features: Tensor) -> Sequence[Tensor]:
        """What each head sees of the backbone's features."""
        return [features] * len(self)

    def rotation_of(self, index: int) -> nn.Module:
        """What makes of the features what one head sees."""
        return nn.Identity()

    def total(self, losses: Sequence[Tensor | None]) -> Tensor:
        """The loss to back-propagate: the sum of the tasks' losses.

        Args:
            losses: a scalar for each task, or None for a task that this batch has no labels for.

        Raises:
            ValueError: if there are more or fewer than tasks, none at all, or one is no scalar.
        """
        self.check_losses(losses)
        return sum_of(losses)

    def backward(
        self, losses: Sequence[Tensor | None], *, accelerator: Accelerator | None = None
    ) -> None:
        """``accelerator.backward(model.total(losses))``, or without an accelerator the same.

        A loss of the backbone alone, such as a penalty, which the package ``rotograd`` takes as a
        second argument, is to be added: ``(model.total(losses) + penalty).backward()``.

        Raises:
            ValueError: as :meth:`total` does.
        """
        total = self.total(losses)
        if accelerator is None:
            total.backward()
        else:
            accelerator.backward(total)

    def check_losses(self, losses: Sequence[Tensor | None]) -> None:
        """Raises ValueError as :meth:`total` says."""
        if len(losses) != len(self):
            raise ValueError(f"expected a loss for each of {len(self)} tasks, got {len(losses)}")
        for index, loss in enumerate(losses):
            if loss is not None and loss.numel() != 1:
                raise ValueError(
                    f"losses[{index}] must be a scalar, got shape {tuple(loss.shape)}; take a mean"
                )
        if all(loss is None for loss in losses):
            raise ValueError("all losses are None: leave out the backward of such a batch")

    def rotation_parameters(self) -> list[nn.Parameter]:
        """What turns and weighs the tasks' gradients, to be trained more slowly than the rest."""
        return []

    def param_groups(self, lr: float, lr_rotation: float) -> list[dict[str, Any]]:
        """Groups for one optimizer: the network, and :meth:`rotation_parameters`.

        ``torch.optim.Adam(model.param_groups(lr=1e-3, lr_rotation=5e-4))``

        The package ``rotograd`` does not register the backbone, so that its ``model.parameters()``
        are little more than the rotations, and its README gives them to an optimizer of their own.
        Here that would step the backbone and the heads twice: write these groups, or
        ``Adam(model.rotation_parameters(), lr=lr_rotation)`` for the second optimizer.
        """
        rotations = self.rotation_parameters()
        apart = {id(parameter) for parameter in rotations}
        network = [
            parameter
            for parameter in self.parameters()
            if parameter.requires_grad and id(parameter) not in apart
        ]
        groups = [{"params": network, "lr": lr}]
        return [*groups, {"params": rotations, "lr": lr_rotation}] if rotations else groups


class SingleTask(nn.Module):
    """One task of a multi-task model, from inputs to prediction, with the same parameters.

    Its backward is the ordinary one: the backbone gets the task's gradient, and a rotation none.
    Take it anew when the model has moved to another device.

    Args:
        backbone: of the model.
        rotation: between the two.
        head: of the task.
    """

    def __init__(self, backbone: nn.Module, rotation: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.rotation, self.head = backbone, rotation, head
        self.training = backbone.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        features, extras = split_extras(self.backbone(*args, **kwargs))
        prediction = self.head(self.rotation(features))
        return prediction if extras is None else (prediction, extras)


def split_extras(output: Any) -> tuple[Tensor, list[Any] | None]:
    """The features of a backbone's output, and what else it returned; None if nothing else."""
    if isinstance(output, tuple | list):
        features, *extras = output
        return features, extras
    return output, None


def sum_of(losses: Sequence[Tensor | None]) -> Tensor:
    """The sum of those that are there, of which there must be one."""
    first, *others = [loss.reshape(()) for loss in losses if loss is not None]
    for loss in others:
        first = first + loss
    return first


def unwrapped(model: nn.Module) -> VanillaMTL:
    """The multi-task model in DistributedDataParallel's or another wrapper."""
    plain = extract_model_from_parallel(model, keep_torch_compile=False)
    if not isinstance(plain, VanillaMTL):
        raise TypeError(f"expected a multi-task model of this package, got {type(plain).__name__}")
    return plain


def total(model: nn.Module, losses: Sequence[Tensor | None]) -> Tensor:
    """``model.total(losses)`` for a model that may be wrapped, as ``accelerator.prepare`` does.

    Raises:
        TypeError: if it wraps no multi-task model.
        ValueError: as :meth:`VanillaMTL.total` does.
    """
    return unwrapped(model).total(losses)
