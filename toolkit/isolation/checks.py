"""Checks that two models and their optimizers are apart, and stay apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.optim import Optimizer

from toolkit.parameters import same_bits

_NAMES_SHOWN = 20  # in an error message


class LeakError(RuntimeError):
    """Something moved that was to rest."""


def check_disjoint(**parts: tuple[nn.Module, Optimizer]) -> None:
    """Refuse models and optimizers that share a parameter.

    ``check_disjoint(critic=(critic, optimizer1), generator=(generator, optimizer2))``

    Args:
        parts: by a name for messages, a model and its own optimizer, prepared or not.

    Raises:
        ValueError: if a parameter belongs to two parts, by model or by optimizer, naming both and
            the parameter; or if an optimizer does not hold any parameter of its model.
    """
    owners: dict[int, str] = {}
    shared: dict[tuple[str, str], list[str]] = {}
    names = {
        id(parameter): f"{part}.{name}"
        for part, (module, _) in parts.items()
        for name, parameter in unwrap(module).named_parameters()
    }
    for part, (module, optimizer) in parts.items():
        own = {id(parameter) for parameter in module.parameters()}
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not own & {id(parameter) for parameter in held}:
            raise ValueError(_not_held(part))
        for parameter in {*module.parameters(), *held}:
            owner = owners.setdefault(id(parameter), part)
            if owner != part:
                label = names.get(id(parameter), f"a parameter of shape {tuple(parameter.shape)}")
                shared.setdefault((owner, part), []).append(label)
    if shared:
        lines = [
            f"{first} and {second}: {enumerate_names(sorted(labels))}"
            for (first, second), labels in shared.items()
        ]
        raise ValueError(
            f"models or optimizers share parameters: {'; '.join(lines)}. Each optimizer must be "
            "made from its own model's parameters() alone, and no tensor be part of two models"
        )


def _not_held(part: str) -> str:
    return (
        f"the optimizer given for {part} does not hold any of its parameters: make it from that "
        "model's parameters(), and take optimizer and model from one prepare()"
    )


@contextlib.contextmanager
def no_leak(
    module: nn.Module, optimizer: Optimizer | None = None, *, enabled: bool = True
) -> Iterator[None]:
    """Refuse that anything of ``module`` moves in the block: values, gradients, buffers, state.

    Everything is compared bit by bit with a copy: for tests, and for the first steps of a training.
    Every rank checks its own; a leak that is on one rank only ends that rank only.

    Args:
        module: prepared or not.
        optimizer: whose state for the parameters of ``module`` must not move either.
        enabled: with False nothing is copied or checked.

    Raises:
        LeakError: at the end of the block, naming what moved; not if the block itself raised.
        ValueError: if ``optimizer`` does not hold any parameter of ``module``.
    """
    if not enabled:
        yield
        return
    plain = unwrap(module)
    if optimizer is not None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not held & {id(parameter) for parameter in plain.parameters()}:
            raise ValueError(_not_held(type(plain).__name__))
    before = _snapshot(plain, optimizer)
    yield
    after = _snapshot(plain, optimizer)
    leaks = []
    for what in {**before, **after}:
        if what not in before:
            leaks.append(f"{what} appeared")
        elif what not in after:
            leaks.append(f"{what} vanished")
        elif not same_bits(before[what], after[what]):
            leaks.append(f"{what} changed")
    if leaks:
        raise LeakError(f"{type(plain).__name__} was to rest, but {enumerate_names(leaks)}")


def _snapshot(module: nn.Module, optimizer: Optimizer | None) -> dict[str, object]:
    """Copies of all that a training step could move."""
    found: dict[str, object] = {f"buffer {name}": t for name, t in module.named_buffers()}
    for name, parameter in module.named_parameters():
        found[f"the value of {name}"] = parameter
        if parameter.grad is not None:
            found[f"the gradient of {name}"] = parameter.grad
        # `in`, because reading a defaultdict would add to the optimizer's state.
        if optimizer is not None and parameter in optimizer.state:
            for key, value in optimizer.state[parameter].items():
                found[f"the optimizer's {key} of {name}"] = value
    return {
        what: value.detach().clone() if isinstance(value, Tensor) else value
        for what, value in found.items()
    }


def unwrap(module: nn.Module) -> nn.Module:
    """The module as the user wrote it, whose parameters have their plain names."""
    plain: nn.Module = extract_model_from_parallel(module, keep_torch_compile=False)
    return plain


def enumerate_names(items: list[str]) -> str:
    """The first of them, and how many more there are, for a message."""
    more = len(items) - _NAMES_SHOWN
    return ", ".join(items[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
