"""Ways to make one step of several tasks' losses, by the names and flags that recipes give them.

======================================== ==========================================================
``sum``                                  the sum of the losses; one backward pass
``rotate``, ``rotograd``,                each head behind a rotation, see ``toolkit.rotograd``; one
``rotogradnorm``                         backward pass
``pcgrad``, ``upgrad``, ``mgda``,        a rule of ``toolkit.aggregation`` that weighs the tasks'
``protect``, ``torchjd:NAME``            gradients of the backbone; a backward pass for each task
======================================== ==========================================================

Rotations align the gradients that tasks have for the same sample. Where each sample has a label
for one task only, as in the two jobs of a bridge, there is nothing to align: ``rotate`` is ``sum``
then, and of ``rotograd`` the equal norms are left.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor

from toolkit.aggregation import Rule, find_rule
from toolkit.flag_types import non_negative_int, positive_float, positive_int
from toolkit.models import MultiHeadModel
from toolkit.optimizers import parameter_groups
from toolkit.rotograd import RotateOnly, RotoGrad, RotoGradNorm

ROTATING: dict[str, type[RotateOnly]] = {
    "rotate": RotateOnly,
    "rotograd": RotoGrad,
    "rotogradnorm": RotoGradNorm,
}


def method_arguments() -> argparse.ArgumentParser:
    """How the tasks' gradients meet; pass what is parsed to :func:`check_method_arguments`."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("several tasks").add_argument
    add(
        "--method",
        default="sum",
        help="of the losses, sum; with a rotation before each head, rotate, rotograd or "
        "rotogradnorm; on the backbone's gradients of each task, pcgrad, upgrad, mgda, protect "
        "(two tasks; the first is untouched) or torchjd:NAME, a weighting of that package",
    )
    add(
        "--learning_rate_rotation",
        type=positive_float,
        help="of rotations and of rotogradnorm's weights; by default half of --learning_rate",
    )
    add(
        "--alpha",
        type=float,
        help="of rotogradnorm: how strongly to favour slow tasks; 1 if left out",
    )
    add(
        "--burn_in_period",
        type=positive_int,
        help="optimizer steps after which rotograd and rotogradnorm take the first losses and "
        "gradient norms anew; 20 if left out",
    )
    add(
        "--coop_after",
        type=non_negative_int,
        metavar="STEPS",
        help="optimizer steps after which each task's own loss turns its rotation too; by default "
        "never",
    )
    return parser


def check_method_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace, num_tasks: int
) -> None:
    """End with the parser's error for flags that the method does not know; fill in the defaults.

    Args:
        parser: had ``method_arguments()`` as a parent.
        args: what it parsed, with ``learning_rate``.
        num_tasks: to train.
    """
    try:
        find_method(args.method, num_tasks)
    except ValueError as error:
        parser.error(f"--method: {error}")
    methods = {"learning_rate_rotation": list(ROTATING), "coop_after": list(ROTATING)}
    methods |= {"burn_in_period": ["rotograd", "rotogradnorm"], "alpha": ["rotogradnorm"]}
    for name, wanted in methods.items():
        if getattr(args, name) is not None and args.method not in wanted:
            parser.error(f"--{name} is of --method {' or '.join(wanted)}, not of {args.method!r}")
    if args.alpha is not None and not math.isfinite(args.alpha):
        parser.error(f"--alpha must be finite, got {args.alpha}")
    if args.learning_rate_rotation is None:
        args.learning_rate_rotation = args.learning_rate / 2
    args.alpha = 1.0 if args.alpha is None else args.alpha
    args.burn_in_period = args.burn_in_period or 20


def find_method(name: str, num_tasks: int) -> Rule | None:
    """The rule that a method of this name follows; None for ``sum`` and those that rotate.

    Args:
        name: see the top of this file.
        num_tasks: to train.

    Raises:
        ValueError: for an unknown name, a package that it lacks, or a rule for fewer tasks.
    """
    if name == "sum" or name in ROTATING:
        return None
    try:
        rule = find_rule(name)
    except ValueError as error:
        raise ValueError(
            f"{name!r} is neither 'sum' nor one of {list(ROTATING)}; {error}"
        ) from None
    rule(torch.eye(num_tasks, dtype=torch.float64))
    return rule


def rotating_model(
    args: argparse.Namespace, network: MultiHeadModel, inputs: Tensor
) -> RotateOnly | None:
    """The same backbone and heads with rotations between them, which begin as identities.

    Args:
        args: with the flags of ``method_arguments()``, and ``report_to``.
        network: whose parts it takes.
        inputs: any that it takes.

    Returns:
        The model; None for a method without rotations.
    """
    if args.method not in ROTATING:
        return None
    with torch.no_grad():
        size = network.backbone(inputs).shape[1]
    options = {"alpha": args.alpha} if args.method == "rotogradnorm" else {}
    model = ROTATING[args.method](
        network.backbone,
        network.heads.values(),
        size,
        burn_in_period=args.burn_in_period,
        **options,
    )
    model.measure_before_rotation = args.report_to != "none"
    return model


def method_groups(
    args: argparse.Namespace, network: MultiHeadModel, rotations: RotateOnly | None
) -> list[dict[str, Any]]:
    """For the optimizer: the network's parts, and what turns and weighs gradients, if anything."""
    groups = parameter_groups(args, network)
    if rotations is not None and (turning := rotations.rotation_parameters()):
        groups.append({"name": "rotations", "params": turning, "lr": args.learning_rate_rotation})
    return groups
