"""A donor's model at work in a receiver: what its head says of the receiver's own inputs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from toolkit.bridge.agreement import in_lines
from toolkit.bridge.errors import BridgeError, PayloadError
from toolkit.bridge.payload import Record
from toolkit.inner_products import all_finite
from toolkit.parameters import SharedParameters, plain_name, schema_differences, schema_of
from toolkit.sharding import full_tensor, is_sharded

TeacherFactory = Callable[[], nn.Module]


class Teacher:
    """A model in eval mode that gets no gradients.

    Args:
        accelerator: its autocast is the teacher's.
        module: maps the receiver's inputs to logits.
        tensors: what a record of the donor fills in, by the donor's names.
    """

    def __init__(
        self, accelerator: Accelerator, module: nn.Module, tensors: Mapping[str, Tensor]
    ) -> None:
        self._accelerator, self.tensors = accelerator, tensors
        self._module = module.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, *inputs: object) -> Tensor:
        """Logits (..., K) of the donor's head for the receiver's inputs.

        Raises:
            BridgeError: if the module does not take them.
        """
        try:
            with self._accelerator.autocast():
                logits: Tensor = self._module(*inputs)
        except Exception as error:
            raise BridgeError(
                f"the teacher fails on the inputs given to teacher_loss(): {error}. Unless "
                "GradientReceiver has a teacher_factory, it is head(backbone(*inputs)): give one "
                "that makes the same of them as the model"
            ) from error
        return logits

    @torch.no_grad()
    def copy_(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over weights and buffers, in place, of as many tensors as it has.

        A collective where these are sharded.
        """
        for name, tensor in self.tensors.items():
            tensor.copy_(full_tensor(tensors[name]))


class Blueprint:
    """How to make teachers of one head, and which weights fit them.

    Args:
        tensors: alike in names, shapes and dtypes to those of a teacher.
        build: makes one.
    """

    def __init__(self, tensors: Mapping[str, Tensor], build: Callable[[], Teacher]) -> None:
        self.build = build
        self._schema = schema_of(tensors)
        self.num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self.num_tensors = len(tensors)

    def differences(self, tensors: Mapping[str, Tensor], job: str) -> list[str]:
        """One line for each tensor of another job that does not fit; empty if all do."""
        return schema_differences(self._schema, schema_of(tensors), "this teacher", job)

    def check(self, record: Record, donor: str) -> None:
        """Refuse weights that do not fit, or are no numbers.

        Raises:
            PayloadError: naming the tensors that differ, or for a value that is not finite.
        """
        if differences := self.differences(record.tensors, donor):
            raise PayloadError("schema", f"the weights do not fit:{in_lines(differences)}")
        if not all_finite(record.tensors.values()):
            raise PayloadError("nonfinite", "a weight is not finite")


class _BackboneAndHead(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, *inputs: object) -> Tensor:
        logits: Tensor = self.head(self.backbone(*inputs))
        return logits


def copy_teacher(
    accelerator: Accelerator, model: nn.Module, shared: SharedParameters, backbone: str, head: str
) -> Teacher:
    """A teacher of the receiver's own shape: ``head(backbone(*inputs))`` of copied modules.

    Args:
        accelerator: the job's accelerator.
        model: the receiver's, unwrapped.
        shared: its shared tensors.
        backbone: name of the backbone's module.
        head: name of the donor's head.

    Raises:
        BridgeError: where these modules cannot be copied.
    """
    if any(map(is_sharded, shared.parameters.values())):
        raise BridgeError(
            "FSDP2 has sharded backbone and head, and such modules cannot be copied for a teacher: "
            "give GradientReceiver a teacher_factory"
        )
    modules = {plain_name(name): m for name, m in reversed(list(model.named_modules()))}
    copies: dict[int, Any] = {}  # by id of what was copied; tied tensors stay tied
    try:
        module = copy.deepcopy(_BackboneAndHead(modules[backbone], modules[head]), copies)
    except Exception as error:
        raise BridgeError(
            f"{backbone!r} and {head!r} cannot be copied for a teacher ({error}): give "
            "GradientReceiver a teacher_factory"
        ) from error
    tensors = {name: copies[id(tensor)] for name, tensor in tensors_of(shared, head).items()}
    return Teacher(accelerator, module, tensors)


def tensors_of(shared: SharedParameters, head: str) -> dict[str, Tensor]:
    """Weights and buffers of the backbone and one head, by name: what its donor publishes."""
    others = tuple(f"{other}." for other in shared.heads if other != head)
    return {name: t for name, t in shared.weights.items() if not name.startswith(others)}


def make_teacher(accelerator: Accelerator, factory: TeacherFactory) -> Teacher:
    """A teacher of any shape, whose ``state_dict`` has the donor's names.

    Args:
        accelerator: the job's accelerator.
        factory: makes a module that maps the receiver's inputs to logits.
    """
    device = accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        module = factory().to(device)
    tensors: dict[int, tuple[str, Tensor]] = {}  # a tied tensor crosses under its first name
    for name, tensor in module.state_dict(keep_vars=True).items():
        tensors.setdefault(id(tensor), (plain_name(name), tensor))
    return Teacher(accelerator, module, dict(tensors.values()))


def blueprints_of(
    accelerator: Accelerator,
    model: nn.Module,
    shared: SharedParameters,
    *,
    backbone: str,
    factory: TeacherFactory | None,
) -> dict[str, Blueprint]:
    """By head, how a receiver makes its teachers: copies of its modules, or as a factory does.

    Args:
        accelerator: the job's accelerator.
        model: the receiver's, unwrapped.
        shared: its shared tensors.
        backbone: name of the backbone's module.
        factory: makes the model of the only head.

    Raises:
        ValueError: for a factory where there are several heads.
    """
    if factory is None:
        return {
            head: Blueprint(
                tensors_of(shared, head),
                functools.partial(copy_teacher, accelerator, model, shared, backbone, head),
            )
            for head in shared.heads
        }
    if len(shared.heads) > 1:
        raise ValueError(f"one teacher_factory cannot make teachers for {list(shared.heads)}")
    (head,) = shared.heads
    first = make_teacher(accelerator, factory)  # to know its shape
    return {head: Blueprint(first.tensors, functools.partial(make_teacher, accelerator, factory))}
