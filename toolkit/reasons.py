"""``gradient-bridge reasons``: all words by which jobs and commands say what happened."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from toolkit.bridge.reasons import (
    ALARMS,
    DROPS,
    EXIT_STATUSES,
    FATES,
    REJECTIONS,
    STATES,
    Reason,
)
from toolkit.terminal import Output

FORMAT = 1  # of the JSON; while it is the same, fields may be added, but none goes away
KINDS: Mapping[str, Mapping[Any, Reason]] = {
    "fate": FATES,
    "rejected": REJECTIONS,
    "dropped": DROPS,
    "alarm": ALARMS,
    "job": STATES,
    "exit status": EXIT_STATUSES,
}
_TITLES = {
    "fate": "Fates of payloads",
    "rejected": "Why a record was rejected",
    "dropped": "Why a payload was dropped",
    "alarm": "Alarms: payloads that are valid and strange",
    "job": "Jobs",
    "exit status": "Exit statuses",
}


def run_reasons(args: argparse.Namespace) -> int:
    """Print the table; the exit status."""
    if args.json:
        rows = [
            {"kind": kind, "code": code, "meaning": reason.meaning, "remedy": reason.remedy}
            for kind, reasons in KINDS.items()
            for code, reason in reasons.items()
        ]
        print(json.dumps({"format": FORMAT, "reasons": rows}, indent=2))
        return 0
    console = Output()
    for kind, reasons in KINDS.items():
        table = Table(
            title=_TITLES[kind], title_justify="left", title_style="bold", box=None,
            header_style="underline", padding=(0, 2, 0, 0), pad_edge=False,
        )  # fmt: skip
        table.add_column("", no_wrap=True, width=15)
        table.add_column("meaning", ratio=1)
        table.add_column("what to do", ratio=1)
        for code, reason in reasons.items():
            table.add_row(str(code), Text(reason.meaning), Text(reason.remedy))
        console.print(table)
        console.print()
    return 0
