"""How often a job looks for something new on the disk."""

from __future__ import annotations

import time


def pause(waited_seconds: float) -> None:
    """Sleep a little: 5 % of the time waited so far, 0.5 ms at least and 0.5 s at most."""
    time.sleep(min(0.5, max(0.0005, 0.05 * waited_seconds)))
