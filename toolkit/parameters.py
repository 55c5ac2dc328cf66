"""Named parameters of a model: which ones two jobs share, and how they differ if they do not."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")  # a module's name below a wrapper


@dataclasses.dataclass(frozen=True, slots=True)
class SharedParameters:
    """The tensors of a model that both jobs hold, by plain name (``heads.h2.weight``).

    Attributes:
        backbone: parameters of the backbone.
        heads: parameters of each donor's head, by the name of its module.
        buffers: persistent buffers of all these modules.
        resting: names of the backbone's parameters that are frozen for good, and equal in all jobs.
    """

    backbone: dict[str, nn.Parameter]
    heads: dict[str, dict[str, nn.Parameter]]
    buffers: dict[str, Tensor]
    resting: frozenset[str] = frozenset()

    @property
    def head(self) -> dict[str, nn.Parameter]:
        """Parameters of all donors' heads."""
        return {name: p for head in self.heads.values() for name, p in head.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All shared parameters."""
        return self.backbone | self.head

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Those that the job's optimizer is to step: all but frozen ones of the backbone.

        Donors' heads are among them, frozen or not: a receiver freezes them for DDP's sake.
        """
        return {name: p for name, p in self.backbone.items() if p.requires_grad} | self.head

    @property
    def weights(self) -> dict[str, Tensor]:
        """Shared parameters and buffers."""
        return {**self.parameters, **self.buffers}

    @property
    def crossing(self) -> dict[str, Tensor]:
        """What the receiver publishes at every step: those that do not rest."""
        return {name: t for name, t in self.weights.items() if name not in self.resting}

    def of_gradient(self, head: str) -> dict[str, nn.Parameter]:
        """What a gradient for backbone and one head is for."""
        backbone = {name: p for name, p in self.backbone.items() if name not in self.resting}
        return backbone | self.heads[head]

    def schemas(self) -> dict[str, dict[str, list[Any]]]:
        """``{name: [dtype, shape]}`` of every shared tensor, by module, fit for JSON.

        The backbone is under ``backbone``, whatever its module's name; each head is under that.
        """
        schemas: dict[str, dict[str, list[Any]]] = {"backbone": {}, **{h: {} for h in self.heads}}
        for name, tensor in self.weights.items():
            module = next((h for h in self.heads if name.startswith(f"{h}.")), "backbone")
            schemas[module] |= schema_of({name: tensor})
        return schemas


def schema_of(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """``{name: [dtype, shape]}`` of some tensors, fit for JSON."""
    return {
        name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        for name, tensor in tensors.items()
    }


def shared_parameters(
    model: nn.Module, backbone: str, heads: Sequence[str], *, frozen_rest: bool = False
) -> SharedParameters:
    """Select what the jobs share from an unwrapped model.

    Args:
        model: the module itself, not its DistributedDataParallel wrapper.
        backbone: name of the backbone's submodule, as in ``model.named_modules()``.
        heads: names of the submodules of the donors' heads, such as ``heads.h2``.
        frozen_rest: whether what is frozen now of the backbone stays so.

    Raises:
        ValueError: if there is no such submodule, it has no parameters, or two of them overlap.
    """
    parts = {module: _parameters_below(model, module) for module in (backbone, *heads)}
    owners: dict[int, str] = {}
    for module, parameters in parts.items():
        for name, parameter in parameters.items():
            if (owner := owners.setdefault(id(parameter), module)) != module:
                raise ValueError(
                    f"{owner!r} and {module!r} overlap in {name!r}: name disjoint ones"
                )
    if len(parts) != 1 + len(heads):
        raise ValueError(f"each module must be named once, got {backbone!r} and {list(heads)}")
    persistent = set(map(plain_name, model.state_dict(keep_vars=True)))
    named_buffers = ((plain_name(name), buffer) for name, buffer in model.named_buffers())
    inside = tuple(f"{module}." for module in parts)
    buffers = {
        name: buffer
        for name, buffer in named_buffers
        if name in persistent and name.startswith(inside)
    }
    of_backbone = parts.pop(backbone)
    frozen = frozenset(name for name, p in of_backbone.items() if not p.requires_grad)
    return SharedParameters(of_backbone, parts, buffers, frozen if frozen_rest else frozenset())


def plain_name(name: str) -> str:
    """The name that a parameter, buffer or module has where no module is wrapped.

    ``torch.compile`` puts a module below a wrapper, and so does activation checkpointing as a
    plugin of FSDP2 asks for it (``fsdp_activation_checkpointing``).
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def _parameters_below(model: nn.Module, module_name: str) -> dict[str, nn.Parameter]:
    modules = {plain_name(name) for name, _ in model.named_modules()}
    if not module_name or module_name not in modules:
        known = sorted(name for name in modules if name and name.count(".") < 2)
        raise ValueError(f"the model has no module {module_name!r}; it has {', '.join(known)}")
    # A tied tensor has several names, some of which may lie outside this module: take the first
    # one inside.
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for full_name, parameter in model.named_parameters(remove_duplicate=False):
        name = plain_name(full_name)
        if name.startswith(f"{module_name}."):
            found.setdefault(id(parameter), (name, parameter))
    if not found:
        raise ValueError(f"module {module_name!r} has no parameters of its own to share")
    return dict(found.values())


def schema_differences(
    mine: Mapping[str, Sequence[Any]],
    theirs: Mapping[str, Sequence[Any]],
    my_job: str,
    their_job: str,
) -> list[str]:
    """One line per tensor that is not the same in both schemas; empty if all are.

    A third entry of a tensor is the digest of one that rests.
    """

    def describe(schema: Mapping[str, Sequence[Any]], name: str) -> str:
        if name not in schema:
            return "absent"
        dtype, shape, *digest = schema[name]
        return f"{dtype} {tuple(shape)}" + "".join(f" frozen at {d[:12]}" for d in digest)

    return [
        f"{name}: {my_job} {describe(mine, name)}, {their_job} {describe(theirs, name)}"
        for name in sorted({*mine, *theirs})
        if list(mine.get(name, ())) != list(theirs.get(name, ()))
    ]


def check_in_optimizer(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Refuse shared parameters that the optimizer would never step.

    A filter on ``requires_grad`` where the optimizer is made drops a head that DDP must not
    manage, and the gradient written to it would train nothing, without any error.

    Raises:
        ValueError: naming the parameters that are in no group.
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if absent := [name for name, parameter in parameters.items() if id(parameter) not in known]:
        raise ValueError(
            f"shared parameters in no optimizer group: {', '.join(absent)}. Give the optimizer "
            "model.parameters() without a filter on requires_grad, and after fully_shard() if you "
            "call that yourself"
        )


def check_optimizer_within(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse optimizer parameters that are not the model's.

    The bridge scales the gradients of one model; those of another would stay sums.

    Raises:
        ValueError: naming the group and the shape of the first one.
    """
    known = {id(parameter) for parameter in model.parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise ValueError(
                    f"optimizer group {number} has a parameter of shape {tuple(parameter.shape)} "
                    "that is not in the model: put all that this optimizer trains into one model"
                )


def check_head_rests(head: Mapping[str, nn.Parameter], *, may_train: bool) -> None:
    """Refuse a donor's head that DDP would wait for in every backward of a receiver.

    On one process too, so that a script that runs on one runs on two. A teacher may put the head
    into the graph once DDP is built.

    Args:
        head: its parameters by name.
        may_train: whether nobody waits for it, as under FSDP2.

    Raises:
        ValueError: naming the first of its parameters that require a gradient.
    """
    trained = [name for name, parameter in head.items() if parameter.requires_grad]
    if trained and not may_train:
        raise ValueError(
            f"{trained[0]!r} requires a gradient, but this job's own loss does not use the "
            "donor's head: under DistributedDataParallel the second step would fail. Call "
            "requires_grad_(False) on the head before accelerator.prepare(); the bridge "
            "writes its gradient, and the optimizer steps it all the same"
        )


def innermost_optimizer(optimizer: Any) -> Any:
    """The optimizer that really steps, without Accelerate's wrappers."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def check_takes_late_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that fails at a parameter's first gradient if it comes at a later step.

    A step without the donor's gradient leaves its head without one: the first steps of a receiver
    that is alone, or a first window of the donor that overflowed.

    Raises:
        ValueError: for fused SGD with momentum.
    """
    inner = innermost_optimizer(optimizer)
    for group in inner.param_groups:
        if isinstance(inner, torch.optim.SGD) and group["fused"] and group["momentum"]:
            raise ValueError(
                "SGD(fused=True) with momentum fails in torch where a parameter gets its first "
                "gradient at a later step than others, as the donor's head does after a step "
                "without a payload: use foreach=True, or no momentum"
            )


def check_only_shared_trains(model: nn.Module, shared: SharedParameters) -> None:
    """Refuse parameters of a donor that would get gradients which cannot cross.

    And warn of those of its head that would get none, as the base of adapters in a head: the
    receiver, which freezes the whole head, cannot tell them from the others.

    Raises:
        ValueError: naming the first ones.
    """
    if resting := [name for name, p in shared.head.items() if not p.requires_grad]:
        logger.warning(
            "%s of the donor's head require no gradient: %s%s. The receiver's optimizer steps them "
            "on a gradient of zero, so that its weight decay moves them: give them a group with "
            "weight_decay=0 there, or make them a part of the backbone",
            len(resting), ", ".join(resting[:3]), ", ..." if len(resting) > 3 else "",
        )  # fmt: skip
    known = {id(parameter) for parameter in shared.parameters.values()}
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in known
    ]
    if others:
        raise ValueError(
            f"the donor's model has parameters outside backbone and head: {', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}. Their gradients would not reach the receiver: "
            "make what the donor's loss uses a part of the backbone, and call "
            "requires_grad_(False) on the rest before accelerator.prepare()"
        )


def same_bits(first: object, second: object) -> bool:
    """Whether two tensors have the same shape, type and bits; two other things, are equal."""
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return first == second
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*bits)
