"""Command-line flags of more than one job of the bridge, and the settings that all flags make."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from toolkit.bridge.config import EXCHANGES, SCOPES, BridgeConfig, Role
from toolkit.bridge.control import SLICE_SECONDS
from toolkit.bridge.errors import BridgeError
from toolkit.bridge.rescaling import RESCALE_RULES
from toolkit.bridge.runs import newest_run
from toolkit.bridge.transport import READ_SECONDS
from toolkit.checkpoints import find_checkpoint
from toolkit.flag_types import positive_float, weights

_DEFAULTS = BridgeConfig()
# Seconds: a slice of a wait, and the tries of a rank to read what the main one has read.
_SHORTEST_RANK_TIMEOUT = SLICE_SECONDS + READ_SECONDS


def bridge_arguments() -> argparse.ArgumentParser:
    """Flags that donor and receiver have in common."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("bridge")
    _add_place(group)
    _add_exchange(group)
    _add_waiting(group)
    return parser


def _add_place(group: argparse._ArgumentGroup) -> None:
    """Where the jobs meet, and whom they believe."""
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


def _add_exchange(group: argparse._ArgumentGroup) -> None:
    """What crosses."""
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


def _add_waiting(group: argparse._ArgumentGroup) -> None:
    """How long to wait, and what then."""
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


def check_bridge_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace, heads: Collection[str] = ()
) -> None:
    """End with the parser's error for bridge settings that are out of range or contradict.

    Args:
        parser: for the error.
        args: what it parsed.
        heads: that donors train, each of which needs a weight; none in a donor.
    """
    try:
        # A checkpoint knows its run, which the recipes leave out.
        config = bridge_config(args, run=None)
        if heads:
            config.weights_of(heads)
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
