"""Ctrl-C and SIGTERM as a wish: end after the present step, with a checkpoint and a farewell.

Schedulers announce the end of a job with SIGTERM and kill it some 30 seconds later, and so does
torchrun with its ranks.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from toolkit.bridge.errors import Interrupted

logger = logging.getLogger(__name__)

T = TypeVar("T")

GRACE_SECONDS = 5.0  # that a step in which the other job is waited for may still take
# A scheduler that signals every process and a launcher that passes the signal on are one wish.
SAME_WISH_SECONDS = 1.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Catches SIGINT and SIGTERM, a wish; a second one, later, ends at once.

    It can catch none in a thread other than the main one, which no signal reaches.

    Attributes:
        signal: the first that this process got, as a number; 0 before.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def seconds(self) -> float:
        """How long ago it came; 0 if none did."""
        return time.monotonic() - self._since if self.signal else 0.0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal, self._since = number, time.monotonic()
            name = signal.Signals(number).name
            logger.warning("%s: ending after this step; a second one ends at once", name)
        elif self.seconds > SAME_WISH_SECONDS:
            raise KeyboardInterrupt

    def bounding(self, poll: Callable[[], T | None], grace: float) -> Callable[[], T | None]:
        """The same poll, which raises :class:`Interrupted` ``grace`` seconds after a signal."""

        def bounded() -> T | None:
            decision = poll()
            if decision is None and self.seconds > grace:
                raise Interrupted(self.signal)
            return decision

        return bounded

    def catch(self) -> None:
        """Begin to catch them."""
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def release(self) -> None:
        """Catch them no longer; safe to call twice."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
