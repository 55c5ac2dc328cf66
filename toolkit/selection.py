"""Which parameters and modules of a model are meant: by name, by pattern, or by the object."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Sequence, Set
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
            modules inside of these that are not used elsewhere too (a shared dropout).
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
    whole: set[int] = set()
    for target in targets:
        for found in _find(model, target):
            if isinstance(found, nn.Module):
                whole.add(id(found))
                parameters.update((id(parameter), parameter) for parameter in found.parameters())
            else:
                parameters[id(found)] = found
    for module in model.modules():
        own = [id(parameter) in parameters for parameter in module.parameters()]
        if own and all(own):
            whole.add(id(module))
    outside = _reached_without(model, whole)
    return Selection(
        {name: param for name, param in model.named_parameters() if id(param) in parameters},
        {name: module for name, module in model.named_modules() if id(module) not in outside},
    )


def _reached_without(module: nn.Module, whole: Set[int]) -> set[int]:
    """Ids of ``module`` and its parts to which a way leads that avoids the modules ``whole``."""
    if id(module) in whole:
        return set()
    return {id(module)}.union(*(_reached_without(child, whole) for child in module.children()))


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
    named: dict[str, nn.Module | nn.Parameter] = dict(model.named_modules(remove_duplicate=False))
    named |= dict(model.named_parameters(remove_duplicate=False))
    del named[""]  # "*" means all, a string that is empty by mistake does not
    if target in named:
        return [named[target]]
    found = [named[name] for name in named if fnmatchcase(name, target)]
    if not found:
        raise ValueError(
            f"{target!r} is no parameter and no module of the model, and no pattern that matches "
            f"one; {_near(target, list(named))}"
        )
    # A dropout that is shared with another part is not meant by a pattern for this one.
    others = {id(named[name]) for name in named if not fnmatchcase(name, target)}
    return [part for part in found if id(part) not in others or _has_parameters(part)] or found


def _has_parameters(part: nn.Module | nn.Parameter) -> bool:
    return isinstance(part, nn.Parameter) or any(True for _ in part.parameters())


def _near(target: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(target, names, n=_MAX_NAMES)
    return f"near names: {', '.join(near)}" if near else f"it has {listed(list(names))}"


def _short(module: nn.Module) -> str:
    return repr(module).partition("\n")[0]


def listed(names: Sequence[str]) -> str:
    """The first of ``names``, and how many more there are."""
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
