"""Donors that go wrong in silence: valid payloads that teach nothing, or too much.

A peer that gives zero gradients, or trains on the wrong data, raises no error: the receiver trains
on, and its loss stays flat. Each check here names one such way.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

from toolkit.bridge.payload import Record
from toolkit.bridge.reasons import ALARMS, Alarm

logger = logging.getLogger(__name__)

PATIENCE = 3  # payloads in a row that a part of the gradient may be exactly zero
# Payloads before a norm is compared with those before; and so many applied in a row that raise an
# alarm are the usual ones from then on.
WARM_UP = 20
MEMORY = 64  # of which these many are kept
NORM_FACTOR = 30.0  # times their median
LOSS_SPAN = 100  # payloads whose mean loss is compared with that of the first so many
# Of which it must have fallen by this part. With labels that say nothing it falls too, by a few
# percent, as the head learns to say nothing.
LOSS_FALL = 0.05
# Those that say something against the payload itself.
OF_ONE_PAYLOAD: tuple[Alarm, ...] = ("zero", "idle head", "idle backbone", "norm")


class Sentinel:
    """Watches the payloads of one donor.

    Args:
        donor: its name.
        backbone: names of the backbone's tensors.

    Attributes:
        alarms: those that the newest payload raised, of those applied and those refused for it.
        counts: how many payloads have raised which, since the run began.
    """

    def __init__(self, donor: str, backbone: Collection[str]) -> None:
        self._donor, self._backbone = donor, frozenset(backbone)
        self._norms: deque[float] = deque(maxlen=MEMORY)
        self._unusual: list[float] = []  # norms of the newest payloads, if they raised an alarm
        self._idle: dict[Alarm, int] = {"zero": 0, "idle head": 0, "idle backbone": 0}
        self._first_losses: list[float] = []
        self._last_losses: deque[float] = deque(maxlen=LOSS_SPAN)
        self.alarms: tuple[Alarm, ...] = ()
        self.counts: dict[str, int] = {}

    def judge(self, record: Record) -> tuple[Alarm, ...]:
        """The alarms that a payload raises; ``zero`` and ``idle ...`` after some in a row only."""
        norm, parts = self._measure(record)
        raised: list[Alarm] = [
            alarm
            for alarm, is_idle in parts.items()
            if is_idle and self._idle[alarm] + 1 >= PATIENCE
        ]
        usual = statistics.median(self._norms) if len(self._norms) >= WARM_UP else math.inf
        if norm > NORM_FACTOR * usual:
            raised.append("norm")
        if self._is_flat(record.header.loss):
            raised.append("flat loss")
        return tuple(raised)

    def remember(self, record: Record) -> None:
        """A payload has been applied: log the alarms that begin with it, and remember it."""
        alarms = self.judge(record)
        norm, parts = self._measure(record)
        for alarm, is_idle in parts.items():
            self._idle[alarm] = self._idle[alarm] + 1 if is_idle else 0
        self._remember_norm(norm, is_usual="norm" not in alarms)
        if (loss := record.header.loss) is not None:
            is_early = len(self._first_losses) < LOSS_SPAN
            (self._first_losses if is_early else self._last_losses).append(loss)
        self.raise_alarms(alarms)

    def _remember_norm(self, norm: float, is_usual: bool) -> None:
        if is_usual:
            self._norms.append(norm)
            self._unusual.clear()
            return
        self._unusual.append(norm)
        if len(self._unusual) == WARM_UP:  # it is no outlier, the scale has changed
            self._norms = deque(self._unusual, maxlen=MEMORY)
            self._unusual.clear()
            logger.warning(
                "the %s: %d payloads in a row were over %g times the usual norm: from here on "
                "theirs is the usual one", self._donor, WARM_UP, NORM_FACTOR,
            )  # fmt: skip

    def raise_alarms(self, alarms: tuple[Alarm, ...]) -> None:
        """A payload is applied in spite of these, or refused for them: count and log them."""
        for alarm in alarms:
            self.counts[alarm] = self.counts.get(alarm, 0) + 1
            if alarm not in self.alarms:
                reason = ALARMS[alarm]
                logger.warning("ALARM: the %s: %s: %s", self._donor, reason.meaning, reason.remedy)
        self.alarms = alarms

    def _measure(self, record: Record) -> tuple[float, dict[Alarm, bool]]:
        """The norm of the mean over samples, and which parts of it are exactly zero."""
        backbone = [x for name, x in record.squares.items() if name in self._backbone]
        head = [x for name, x in record.squares.items() if name not in self._backbone]
        squares = {"backbone": sum(backbone), "head": sum(head)}
        total = squares["backbone"] + squares["head"]
        parts: dict[Alarm, bool] = {
            "zero": total == 0,
            "idle head": bool(head) and squares["head"] == 0 < total,
            "idle backbone": bool(backbone) and squares["backbone"] == 0 < total,
        }
        return math.sqrt(total) / record.header.count, parts

    def _is_flat(self, loss: float | None) -> bool:
        """Whether the newest losses, with this one, are hardly lower on average than the first."""
        newest = [*self._last_losses, *([] if loss is None else [loss])][-LOSS_SPAN:]
        is_full = loss is not None and len(newest) == LOSS_SPAN
        if not is_full:
            return False
        first = statistics.fmean(self._first_losses)
        return statistics.fmean(newest) > first - LOSS_FALL * abs(first)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold; fit for JSON."""
        return {
            "norms": list(self._norms),
            "unusual": list(self._unusual),
            "idle": dict(self._idle),
            "first_losses": list(self._first_losses),
            "last_losses": list(self._last_losses),
            "counts": dict(self.counts),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state`."""
        self._norms = deque(state["norms"], maxlen=MEMORY)
        self._unusual = list(state["unusual"])
        self._idle = dict(state["idle"])
        self._first_losses = list(state["first_losses"])
        self._last_losses = deque(state["last_losses"], maxlen=LOSS_SPAN)
        self.counts = dict(state["counts"])
