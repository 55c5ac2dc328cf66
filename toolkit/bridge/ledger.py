"""The fate of every payload: applied, dropped, rejected, skipped, or still pending.

The counts are part of the receiver's checkpoint. The file beside them is the trail: one JSON line
per fate, one file per attempt of the receiver.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

Fate = Literal["applied", "dropped", "rejected", "skipped"]


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """What became of one payload, at which receiver step, and why."""

    sequence: int
    fate: Fate
    receiver_step: int
    reason: str = ""


class Ledger:
    """Counts fates and appends them to ``path``.

    Args:
        path: the trail's file, or None on ranks that keep no trail.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.counts: dict[str, int] = dict.fromkeys(get_args(Fate), 0)

    def record(self, entries: Iterable[Entry]) -> None:
        """Count ``entries`` and append them to the trail."""
        lines = []
        for entry in entries:
            self.counts[entry.fate] += 1
            lines.append(json.dumps(dataclasses.asdict(entry)) + "\n")
        if lines and self._path is not None:
            with self._path.open("a") as file:
                file.writelines(lines)
