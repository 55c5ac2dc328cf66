"""Which parameters and modules of a model are meant: by name, by pattern, or by the object."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

Target: TypeAlias = str | nn.Module | nn.Parameter

_MAX_NAMES = 8  # in a message


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """A part of a model.

    Attributes:
        parameters: by plain name; a tied one once, under its first name.
        modules: by name, every module of which nothing lies outside the selection: those whose
            parameters are all selected, those without parameters that were asked for, and all
            modules inside of these.
    """

    parameters: dict[str, nn.Parameter]
    modules: dict[str, nn.Module]


def select(model: nn.Module, targets: Sequence[Target]) -> Selection:
    """Find what ``targets`` mean.

    Args:
        model: the plain model, without a wrapper such as DistributedDataParallel.
        targets: each the name of a parameter or a module as ``named_parameters()`` and
            ``named_modules()`` give it, a pattern of such names (``*`` matches dots too), a module
            of the model or a parameter of the model.

    Raises:
        TypeError: for a target of another type.
        ValueError: without targets, and for a target that the model does not have; names near to
            it are listed.
    """
    if not targets:
        raise ValueError("no target: name at least one parameter, module or pattern")
    parameters: dict[int, nn.Parameter] = {}
    modules: set[int] = set()
    for target in targets:
        for found in _find(model, target):
            if isinstance(found, nn.Module):
                modules.update(id(module) for module in found.modules())
                parameters.update((id(parameter), parameter) for parameter in found.parameters())
            else:
                parameters[id(found)] = found
    for module in model.modules():
        own = [id(parameter) in parameters for parameter in module.parameters()]
        if own and all(own):
            modules.update(id(inner) for inner in module.modules())
    return Selection(
        {name: param for name, param in model.named_parameters() if id(param) in parameters},
        {name: module for name, module in model.named_modules() if id(module) in modules},
    )


def _find(model: nn.Module, target: Target) -> list[nn.Module | nn.Parameter]:
    if isinstance(target, nn.Module):
        if all(module is not target for module in model.modules()):
            raise ValueError(
                f"this {type(target).__name__} is no module of the model: {_short(target)}. Give "
                "the model's own module, or its name"
            )
        return [target]
    if isinstance(target, nn.Parameter):
        if all(parameter is not target for parameter in model.parameters()):
            raise ValueError(
                f"this parameter of shape {tuple(target.shape)} is none of the model's. Give the "
                "model's own parameter, or its name; wrappers such as FSDP replace parameters"
            )
        return [target]
    if not isinstance(target, str):
        raise TypeError(
            f"target {target!r} is a {type(target).__name__}; give a name, a pattern, a module or "
            "a parameter"
        )
    named: dict[str, nn.Module | nn.Parameter] = dict(model.named_modules())
    named |= dict(model.named_parameters(remove_duplicate=False))
    found = [named[name] for name in named if fnmatchcase(name, target)]
    if not found:
        raise ValueError(
            f"{target!r} is no parameter and no module of the model, and no pattern that matches "
            f"one; {_near(target, [name for name in named if name])}"
        )
    return found


def _near(target: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(target, names, n=_MAX_NAMES)
    return f"near names: {', '.join(near)}" if near else f"it has {listed(list(names))}"


def _short(module: nn.Module) -> str:
    return repr(module).partition("\n")[0]


def listed(names: Sequence[str]) -> str:
    """The first of ``names``, and how many more there are."""
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
