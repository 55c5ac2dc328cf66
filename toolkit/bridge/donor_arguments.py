"""The command-line flags of a donor's side of the bridge, as an argparse parent."""

from __future__ import annotations

import argparse

from toolkit.bridge.compression import COMPRESSIONS
from toolkit.bridge.config import BridgeConfig
from toolkit.flag_types import checkpointing_steps

_DEFAULTS = BridgeConfig()


def donor_arguments() -> argparse.ArgumentParser:
    """Flags of the donor only."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("bridge (donor)")
    _add_payloads(group)
    _add_budget(group)
    return parser


def _add_payloads(group: argparse._ArgumentGroup) -> None:
    """Whose payloads they are, how often they come, and how many bytes they have."""
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


def _add_budget(group: argparse._ArgumentGroup) -> None:
    """How many of them may lie on the disk."""
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
