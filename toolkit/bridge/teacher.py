"""A donor's model at work in a receiver: what its head says of the receiver's own inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from toolkit.bridge.errors import BridgeError, PayloadError
from toolkit.bridge.payload import Record, all_finite
from toolkit.parameters import SharedParameters, plain_name, schema_differences, schema_of
from toolkit.sharding import is_sharded

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
        self._accelerator, self._tensors = accelerator, tensors
        self._module = module.requires_grad_(False).eval()

    @property
    def num_bytes(self) -> int:
        """The size of all that a record fills in."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @property
    def num_tensors(self) -> int:
        """How many tensors these are."""
        return len(self._tensors)

    @torch.no_grad()
    def __call__(self, *inputs: object) -> Tensor:
        """Logits (..., K) of the donor's head for the receiver's inputs."""
        with self._accelerator.autocast():
            logits: Tensor = self._module(*inputs)
        return logits

    def check(self, record: Record, donor: str) -> None:
        """Refuse weights that do not fit, or are no numbers.

        Raises:
            PayloadError: naming the tensors that differ, or for a value that is not finite.
        """
        differences = schema_differences(
            schema_of(self._tensors), schema_of(record.tensors), "this teacher", donor
        )
        if differences:
            raise PayloadError("schema", "the weights do not fit:\n  " + "\n  ".join(differences))
        if not all_finite(record.tensors.values()):
            raise PayloadError("nonfinite", "a weight is not finite")

    @torch.no_grad()
    def copy_(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over weights and buffers, in place, of as many tensors as it has."""
        for name, tensor in self._tensors.items():
            tensor.copy_(tensors[name])


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
    others = tuple(f"{other}." for other in shared.heads if other != head)
    tensors: dict[str, Tensor] = {
        name: copies[id(tensor)]
        for name, tensor in shared.weights.items()
        if not name.startswith(others)
    }
    return Teacher(accelerator, module, tensors)


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
