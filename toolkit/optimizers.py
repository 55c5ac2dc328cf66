"""Any optimizer of torch by name, in its loop, foreach or fused form, with any of its arguments."""

from __future__ import annotations

import argparse
import ast
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from toolkit.flag_types import positive_float

FORMS: dict[str, dict[str, bool]] = {
    "auto": {},
    "loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
_REFUSED = {
    "LBFGS": "it moves all parameters along one common history, so that none can rest",
    "SparseAdam": "it takes sparse gradients only, and these layers have dense ones",
}
# Given by flags of their own, or of use in a CUDA graph or a differentiated step only.
_NOT_SETTINGS = {"params", "lr", "foreach", "fused", "capturable", "differentiable"}


def optimizer_arguments(default: str) -> argparse.ArgumentParser:
    """Which optimizer: a parent for ``argparse.ArgumentParser``.

    Args:
        default: name of the class.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("optimizer").add_argument
    add(
        "--optimizer",
        type=optimizer_name,
        default=default,
        metavar="NAME",
        help="a class of torch.optim, in any case: adamw, rmsprop, muon, ...",
    )
    add("--learning_rate", type=positive_float, help="by default that of the class")
    add(
        "--optimizer_form",
        choices=FORMS,
        default="auto",
        help="one parameter after the other, all in lists, or in one kernel; 'auto': as torch "
        "chooses",
    )
    add(
        "--optimizer_args",
        type=key_value,
        nargs="+",
        metavar="KEY=VALUE",
        help="further arguments of the class: weight_decay=0.1 betas=(0.9,0.99) amsgrad=True",
    )
    return parser


def optimizer_name(text: str) -> str:
    """The class that ``text`` names, whatever its case; for ``type=`` of a flag."""
    classes = {
        name.lower(): name
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    }
    name = classes.get(text.lower())
    if name is None:
        known = sorted(set(classes.values()) - _REFUSED.keys())
        raise argparse.ArgumentTypeError(f"torch.optim has no {text!r}; take {', '.join(known)}")
    if name in _REFUSED:
        raise argparse.ArgumentTypeError(f"{name} cannot be used here: {_REFUSED[name]}")
    return name


def key_value(text: str) -> tuple[str, Any]:
    """``key=value`` with a Python literal as value; for ``type=`` of a flag."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"expected key=value, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError):
        raise argparse.ArgumentTypeError(
            f"{key}= wants a Python literal such as 0.9, (0.9,0.99), True or 'text', got {value!r}"
        ) from None


def make_optimizer(args: argparse.Namespace, params: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer that ``optimizer_arguments()`` describe, over ``params``.

    Raises:
        ValueError: if the class has no such form or takes no such argument, naming those that it
            takes.
        Exception: whatever the class raises for a value that it refuses.
    """
    kind = getattr(torch.optim, args.optimizer)
    signature = inspect.signature(kind).parameters
    for switch, value in FORMS[args.optimizer_form].items():
        if value and switch not in signature:
            raise ValueError(f"{args.optimizer} has no {args.optimizer_form} form")
    settings = dict(args.optimizer_args or ())
    if unknown := settings.keys() & {"lr", "foreach", "fused"}:
        raise ValueError(
            f"{', '.join(sorted(unknown))}: give it by --learning_rate or --optimizer_form"
        )
    accepted = [name for name in signature if name not in _NOT_SETTINGS]
    if unknown := settings.keys() - accepted:
        raise ValueError(
            f"{args.optimizer} takes no argument {', '.join(sorted(unknown))} here; it takes "
            f"{', '.join(accepted)}"
        )
    settings |= {k: v for k, v in FORMS[args.optimizer_form].items() if k in signature}
    if args.learning_rate is not None:
        settings["lr"] = args.learning_rate
    optimizer: Optimizer = kind(params, **settings)
    return optimizer
