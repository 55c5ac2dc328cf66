"""Any optimizer of torch by name and form, a learning rate for each part of a model, a schedule."""

from __future__ import annotations

import argparse
import ast
import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from toolkit.flag_types import non_negative_float, positive_float
from toolkit.models import MultiHeadModel

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
# The flag with a part's own learning rate.
_RATE_FLAGS = {"backbone": "lr_backbone", "h1": "lr_head1", "h2": "lr_head2", "h3": "lr_head3"}


def optimizer_arguments(
    default: str, learning_rate: float | None = None
) -> argparse.ArgumentParser:
    """Which optimizer: a parent for ``argparse.ArgumentParser``.

    Args:
        default: name of the class.
        learning_rate: by default; None for that of the class.
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
    add(
        "--learning_rate",
        type=positive_float,
        default=learning_rate,
        help="after warm-up" if learning_rate else "by default that of the class",
    )
    add(
        "--weight_decay",
        type=non_negative_float,
        help="of all parameters; by default that of the class (AdamW 0.01, SGD 0)",
    )
    add(
        "--optimizer_form",
        choices=FORMS,
        default="auto",
        help="one parameter after the other, all in lists, or in one kernel; 'auto': as torch "
        "chooses",
    )
    add(
        "--optimizer_args",
        type=setting,
        nargs="+",
        metavar="KEY=VALUE",
        help="further arguments of the class: momentum=0.9 betas=(0.9,0.99) amsgrad=True",
    )
    return parser


def rate_arguments(heads: Sequence[str]) -> argparse.ArgumentParser:
    """A learning rate for each part of the model: a parent for ``argparse.ArgumentParser``.

    Args:
        heads: that the job can train, of ``h1``, ``h2`` and ``h3``.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("learning rates of parts").add_argument
    for part in ("backbone", *heads):
        add(
            f"--{_RATE_FLAGS[part]}",
            type=positive_float,
            help=f"learning rate of the {'' if part == 'backbone' else 'head '}{part}, if another "
            "than --learning_rate; the schedule multiplies both alike",
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


def setting(text: str) -> str:
    """``key=value`` with a Python literal as value; for ``type=`` of a flag.

    It stays text, so that what a job records of its flags gives the same flags again.
    """
    _key_value(text)
    return text


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"expected key=value, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError):
        raise argparse.ArgumentTypeError(
            f"{key}= wants a Python literal such as 0.9, (0.9,0.99), True or 'text', got {value!r}"
        ) from None


def parameter_groups(args: argparse.Namespace, network: MultiHeadModel) -> list[dict[str, Any]]:
    """For one optimizer: a group for the backbone and one for each head, by ``name``.

    One optimizer and not several, which would share one loss scaler: with clipping, the second
    one's gradients are unscaled twice. Parameters that require no gradient are among them, as the
    bridge gives gradients to some.

    Args:
        args: with ``learning_rate`` and, for parts that have one, the flags of
            ``rate_arguments()``.
        network: before ``prepare``.

    Raises:
        ValueError: for the learning rate of a part that the network does not have.
    """
    groups = []
    parts = {"backbone": network.backbone, **network.heads}
    for name, flag in _RATE_FLAGS.items():
        if name not in parts and getattr(args, flag, None) is not None:
            raise ValueError(f"--{flag} is of a part that this job does not train: {name}")
    for name, part in parts.items():
        rate = getattr(args, _RATE_FLAGS[name], None) if name in _RATE_FLAGS else None
        rate = args.learning_rate if rate is None else rate
        groups.append({"name": name, "params": list(part.parameters()), "lr": rate})
    return groups


def build_optimizer(
    args: argparse.Namespace, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]]
) -> Optimizer:
    """The optimizer that ``optimizer_arguments()`` describe, over ``params``.

    Args:
        args: the parsed flags.
        params: parameters, or groups of them, such as :func:`parameter_groups` makes.

    Raises:
        ValueError: if the class has no such form or takes no such argument, naming those that it
            takes; or if it refuses a value.
    """
    kind = getattr(torch.optim, args.optimizer)
    signature = inspect.signature(kind).parameters
    for switch, value in FORMS[args.optimizer_form].items():
        if value and switch not in signature:
            raise ValueError(f"{args.optimizer} has no {args.optimizer_form} form")
    settings = dict(map(_key_value, args.optimizer_args or ()))
    if unknown := settings.keys() & {"lr", "weight_decay", "foreach", "fused"}:
        raise ValueError(
            f"{', '.join(sorted(unknown))}: give it by --learning_rate, --weight_decay or "
            "--optimizer_form"
        )
    if args.weight_decay is not None:
        settings["weight_decay"] = args.weight_decay
    accepted = [name for name in signature if name not in _NOT_SETTINGS]
    if unknown := settings.keys() - accepted:
        raise ValueError(
            f"{args.optimizer} takes no argument {', '.join(sorted(unknown))} here; it takes "
            f"{', '.join(accepted)}"
        )
    settings |= {k: v for k, v in FORMS[args.optimizer_form].items() if k in signature}
    if args.learning_rate is not None:
        settings["lr"] = args.learning_rate
    try:
        optimizer: Optimizer = kind(params, **settings)
    except Exception as error:  # classes of torch.optim refuse bad values in many ways
        raise ValueError(f"{args.optimizer} fails with these arguments: {error}") from error
    return optimizer


def build_scheduler(
    args: argparse.Namespace, optimizer: Optimizer, num_training_steps: int
) -> LambdaLR:
    """The learning rate schedule, of every group alike; step it once per optimizer step.

    Do not prepare it: a prepared scheduler advances once per rank. Register it for checkpointing
    instead.

    Args:
        args: with ``lr_scheduler_type`` and ``num_warmup_steps``.
        optimizer: bare, before ``prepare``.
        num_training_steps: optimizer steps, at whose end ``linear`` and ``cosine`` reach zero.
    """
    warmup = args.num_warmup_steps

    def factor(step: int) -> float:
        if args.lr_scheduler_type == "constant":
            return 1.0
        if step < warmup:
            return step / warmup
        if args.lr_scheduler_type == "constant_with_warmup":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, num_training_steps - warmup))
        if args.lr_scheduler_type == "linear":
            return 1.0 - progress
        return 0.5 * (1.0 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def learning_rates(scheduler: LambdaLR) -> dict[str, float]:
    """The present learning rate by TensorBoard tag; one for each group if not all have the same."""
    rates = [float(rate) for rate in scheduler.get_last_lr()]
    if len(set(scheduler.base_lrs)) == 1:
        return {"train/learning rate": rates[0]}
    names = [group["name"] for group in scheduler.optimizer.param_groups]
    return {f"train/learning rate {name}": rate for name, rate in zip(names, rates, strict=True)}
