"""The command-line flags of a receiver's side of the bridge, as an argparse parent."""

from __future__ import annotations

import argparse

from toolkit.bridge.config import ALARM_RULES, DISTILL_LOSSES, STALE_RULES, BridgeConfig
from toolkit.flag_types import positive_float

_DEFAULTS = BridgeConfig()


def receiver_arguments() -> argparse.ArgumentParser:
    """Flags of the receiver only."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("bridge (receiver)")
    _add_start(group)
    _add_outer_step(group)
    _add_staleness(group)
    _add_gradient_rules(group)
    _add_teacher(group)
    _add_replay(group)
    return parser


def _add_start(group: argparse._ArgumentGroup) -> None:
    """What it begins with."""
    group.add_argument(
        "--num_donors",
        type=int,
        default=_DEFAULTS.num_donors,
        metavar="N",
        help="donors to wait for before the first step; others may join and leave at any time",
    )
    group.add_argument(
        "--init_h2",
        choices=("own", "donor"),
        default=_DEFAULTS.init_h2,
        help="--exchange head: begin with the receiver's own h2, or with the donor's",
    )


def _add_outer_step(group: argparse._ArgumentGroup) -> None:
    """What exchange delta does with a donor's difference."""
    group.add_argument(
        "--outer_learning_rate",
        type=float,
        default=_DEFAULTS.outer_learning_rate,
        metavar="LR",
        help="--exchange delta: of the step that takes a donor's difference over; 1: as it is",
    )
    group.add_argument(
        "--outer_momentum",
        type=float,
        default=_DEFAULTS.outer_momentum,
        metavar="M",
        help="--exchange delta: Nesterov momentum of that step",
    )


def _add_staleness(group: argparse._ArgumentGroup) -> None:
    """How late a gradient may come, and what then."""
    group.add_argument(
        "--max_staleness",
        type=int,
        default=_DEFAULTS.max_staleness,
        metavar="STEPS",
        help="receiver steps that the weights of a donor's gradient may be old; 0: lockstep, exact",
    )
    group.add_argument(
        "--stale",
        choices=STALE_RULES,
        default=_DEFAULTS.stale,
        help="what becomes of a gradient whose weights are 1 to --max_staleness steps old: applied "
        "as it is; damped, divided by 1 + its age; or compensated for what the weights have "
        "changed by (DC-ASGD, with a constant or an adaptive lambda). For that, and to log the "
        "change, each rank keeps backbone and donors' heads --max_staleness + 1 times in memory",
    )
    group.add_argument(
        "--compensation",
        type=float,
        metavar="LAMBDA",
        help="of --stale compensate, by default 0.04 over the mean loss; or of "
        "compensate_adaptive, by default 2 over a weight",
    )


def _add_gradient_rules(group: argparse._ArgumentGroup) -> None:
    """What a donor's gradient may do to the own one."""
    group.add_argument(
        "--max_donor_norm",
        type=positive_float,
        metavar="NORM",
        help="shrink a donor's part of the gradient, rescaled, to this norm if it is longer; by "
        "default it is added as it is",
    )
    group.add_argument(
        "--on_alarm",
        choices=ALARM_RULES,
        default=_DEFAULTS.on_alarm,
        help="what becomes of a donor's payload that is valid and strange (exactly zero, 30 times "
        "the usual norm): a warning, or a rejection, which puts it aside",
    )
    group.add_argument(
        "--aggregate",
        default=_DEFAULTS.aggregate,
        metavar="RULE",
        help="what becomes of the two gradients of the backbone, after rescaling: sum (joint "
        "training); for gradients that conflict pcgrad, upgrad, mgda, protect (the receiver's own "
        "is untouched); or torchjd:NAME, a weighting of that package. Heads are not concerned",
    )


def _add_teacher(group: argparse._ArgumentGroup) -> None:
    """How to learn from a donor's weights."""
    group.add_argument(
        "--distill_loss",
        choices=DISTILL_LOSSES,
        default=_DEFAULTS.distill_loss,
        help="--exchange distill, auto: how far the receiver is from its teacher: the divergence "
        "of their classes, or the squared difference of their outputs",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=_DEFAULTS.temperature,
        help="--exchange distill, auto: of --distill_loss kl, divides the logits of receiver and "
        "teacher; above 1 small probabilities count for more, 1 leaves them as they are",
    )


def _add_replay(group: argparse._ArgumentGroup) -> None:
    """A run that can be proven."""
    group.add_argument(
        "--keep_payloads",
        action="store_true",
        help="keep every payload that is applied, for 'gradient-bridge verify'. Each step takes "
        "the size of backbone and donor's head on the disk, for good: 25 million float32 "
        "parameters and 1,000 steps take 93 GiB, which --payload_budget_gib does not count",
    )
    group.add_argument(
        "--replay",
        metavar="RUN_DIR",
        help="instead of waiting for a donor, take in every step what this finished run took, from "
        "the payloads that it kept; 'gradient-bridge verify' does so, and compares",
    )
