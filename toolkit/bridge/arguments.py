"""The bridge's command-line flags, as argparse parents, and the settings that they make."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from toolkit.bridge.compression import COMPRESSIONS
from toolkit.bridge.config import (
    ALARM_RULES,
    DISTILL_LOSSES,
    EXCHANGES,
    SCOPES,
    STALE_RULES,
    BridgeConfig,
    Role,
)
from toolkit.bridge.control import SLICE_SECONDS
from toolkit.bridge.errors import BridgeError
from toolkit.bridge.rescaling import RESCALE_RULES
from toolkit.bridge.runs import newest_run
from toolkit.bridge.transport import READ_SECONDS
from toolkit.checkpoints import find_checkpoint
from toolkit.flag_types import checkpointing_steps, positive_float, weights

_DEFAULTS = BridgeConfig()
# Seconds: a slice of a wait, and the tries of a rank to read what the main one has read.
_SHORTEST_RANK_TIMEOUT = SLICE_SECONDS + READ_SECONDS


def bridge_arguments() -> argparse.ArgumentParser:
    """Flags that donor and receiver have in common."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("bridge")
    group.add_argument(
        "--runs_dir",
        default=str(_DEFAULTS.runs_dir),
        help="directory that both jobs share; every run is a numbered directory in it",
    )
    group.add_argument(
        "--run",
        default=None,
        metavar="NAME",
        help="join or begin this run; by default the newest that waits for this job, or a new one",
    )
    group.add_argument(
        "--key_file",
        metavar="PATH",
        help="a file that holds a key, of at least 16 bytes, and is readable by its owner only; or "
        "set GRADIENT_BRIDGE_KEY. With a key, the same on both sides, nothing is taken that no job "
        "of this run has signed, and only the owner may use the bridge's files",
    )
    group.add_argument(
        "--exchange",
        choices=EXCHANGES,
        default=_DEFAULTS.exchange,
        help="what crosses, the same on both sides. gradient: the donor's gradients at the "
        "receiver's weights, exact. auto: the same, and while no donor is there a teacher for h2: "
        "what a donor has trained by itself, or the receiver's own h2 as it was. delta: what "
        "--local_steps optimizer steps of the donor from the receiver's weights change, for slow "
        "disks. distill: the donor's own weights, a teacher. head: gradients of the donor's own "
        "head, which leave the backbone alone",
    )
    group.add_argument(
        "--local_steps",
        type=int,
        default=_DEFAULTS.local_steps,
        metavar="K",
        help="--exchange delta: steps of either job between two exchanges; the same on both sides",
    )
    group.add_argument(
        "--scope",
        choices=SCOPES,
        default=_DEFAULTS.scope,
        help="gradients that cross: of backbone and head (exact), or of the head only; the same on "
        "both sides",
    )
    group.add_argument(
        "--peer_wait",
        type=float,
        default=_DEFAULTS.peer_wait,
        metavar="SECONDS",
        help="how long the other job may show no sign of life before this one goes on alone",
    )
    group.add_argument(
        "--rank_timeout",
        type=positive_float,
        default=1800.0,
        metavar="SECONDS",
        help="how long the ranks of this job wait for one of them that does not come, because its "
        "host is cut off, say, before the job ends; loading the data must take less",
    )
    group.add_argument(
        "--require_peer",
        action="store_true",
        help="end with an error instead of going on alone",
    )
    return parser


def donor_arguments() -> argparse.ArgumentParser:
    """Flags of the donor only."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("bridge (donor)")
    group.add_argument(
        "--donor_name",
        default=_DEFAULTS.donor_name,
        metavar="NAME",
        help="this donor's name in the run; several donors of one run need different ones",
    )
    group.add_argument(
        "--publish_every",
        type=checkpointing_steps,
        default=_DEFAULTS.publish_every,
        metavar="N|epoch",
        help="--exchange head, distill: steps of the donor between two payloads",
    )
    group.add_argument(
        "--compression",
        choices=COMPRESSIONS,
        default=_DEFAULTS.compression,
        help="of its payloads. bf16: rounded, half the bytes. topk: the elements that are largest "
        "in magnitude, and what is left out is added to the next payload; the main process keeps "
        "that twice, each the size of backbone and head",
    )
    group.add_argument(
        "--topk_ratio",
        type=float,
        default=_DEFAULTS.topk_ratio,
        metavar="SHARE",
        help="--compression topk: the share of the elements that is sent, at 4 bytes each",
    )
    group.add_argument(
        "--payload_budget_files",
        type=int,
        default=_DEFAULTS.payload_budget_files,
        metavar="N",
        help="payloads kept for the receiver's checkpoints, at most",
    )
    group.add_argument(
        "--payload_budget_gib",
        type=float,
        default=_DEFAULTS.payload_budget_gib,
        metavar="GIB",
        help="their size on disk, at most",
    )
    return parser


def rescaling_arguments() -> argparse.ArgumentParser:
    """Flags that say how two gradients make one step; of the receiver and of joint training."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("rescaling")
    group.add_argument(
        "--rescale",
        choices=RESCALE_RULES,
        default=_DEFAULTS.rescale,
        help="match: mean own loss + weight * mean donor loss; append: the donor's samples are "
        "added to the batch; pool: the mean over the union of both batches",
    )
    group.add_argument(
        "--donor_weight",
        type=weights,
        default=_DEFAULTS.donor_weight,
        metavar="LAMBDA",
        help="weight of the donors' losses in the joint loss; where donors train several heads, "
        "of each: heads.h2=0.7,heads.h3=0.3",
    )
    return parser


def receiver_arguments() -> argparse.ArgumentParser:
    """Flags of the receiver only."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("bridge (receiver)")
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
        help="--exchange distill, auto: that the classes of kl are softened by; 1 leaves them as "
        "they are",
    )
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
    return parser


def check_bridge_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace, heads: Iterable[str] = ()
) -> None:
    """End with the parser's error for bridge settings that are out of range or contradict.

    Args:
        parser: for the error.
        args: what it parsed.
        heads: of the donors, each of which needs a weight.
    """
    try:
        # A checkpoint knows its run, which the recipes leave out.
        config = bridge_config(args, run=None)
        for head in heads:
            config.weight_of(head)
    except ValueError as error:
        parser.error(str(error))
    if args.rank_timeout <= _SHORTEST_RANK_TIMEOUT:
        parser.error(
            f"argument --rank_timeout: must be more than {_SHORTEST_RANK_TIMEOUT:g} s, got "
            f"{args.rank_timeout:g}: so long may ranks wait for the main one while all is well"
        )


def checkpoint_to_resume(args: argparse.Namespace, role: Role) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` names; None without that flag.

    ``latest`` is looked for in ``--output_dir``, else in ``--run``, else in the newest run.

    Raises:
        BridgeError: if there is none.
    """
    if args.resume_from_checkpoint is None:
        return None
    runs_dir = Path(args.runs_dir)
    output_dir = args.output_dir
    if output_dir is None:
        run = args.run or newest_run(runs_dir)
        output_dir = runs_dir / (run or "") / role
    try:
        return find_checkpoint(args.resume_from_checkpoint, output_dir)
    except ValueError as error:
        raise BridgeError(str(error)) from None


def bridge_config(args: argparse.Namespace, **settings: Any) -> BridgeConfig:
    """The settings that the flags in ``args`` make, where ``settings`` does not say otherwise.

    Raises:
        ValueError: for a value out of range or a contradiction.
    """
    names = [field.name for field in dataclasses.fields(BridgeConfig) if hasattr(args, field.name)]
    return BridgeConfig(**{name: getattr(args, name) for name in names} | settings)
