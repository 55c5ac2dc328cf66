"""What a donor's next accumulation window is for. Lives on the main process."""

from __future__ import annotations

import dataclasses
import logging
from typing import Literal

from toolkit.bridge.config import BridgeConfig
from toolkit.bridge.liveness import PeerWatch, Wait
from toolkit.bridge.publisher import Publisher
from toolkit.bridge.waiting import Waiting
from toolkit.bridge.weights_inbox import WeightsInbox

logger = logging.getLogger(__name__)

MAX_REPLACEMENTS = 1  # of a rejected payload by another; after that a skip record takes its place


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """What the donor's next accumulation window is for.

    Attributes:
        action: ``follow`` new weights; the present ones ``again``; ``skip`` them, whose payload
            was rejected too often; train ``alone``; or ``stop``, after loading what is named.
        sequence: of the weights to load; -1 for none.
        digest: of their tensors.
    """

    action: Literal["follow", "again", "skip", "alone", "stop"]
    sequence: int = -1
    digest: str = ""


class NextWindow:
    """Decides it, from the receiver's stream and what the receiver rejected.

    Args:
        inbox: of the receiver's weights.
        publisher: of this donor's stream.
        receiver: a watch over its life.
        waiting: of this job.
        config: the settings.
    """

    def __init__(
        self,
        inbox: WeightsInbox,
        publisher: Publisher,
        receiver: PeerWatch,
        waiting: Waiting,
        config: BridgeConfig,
    ) -> None:
        self._inbox, self._publisher, self._receiver = inbox, publisher, receiver
        self._waiting, self._config = waiting, config
        self._wait: Wait | None = None  # for the present window
        self._replacements = 0  # at the present weights

    def begin(self) -> None:
        """Ask anew."""
        self._wait = None

    def note_loaded(self) -> None:
        """Other weights are in the model."""
        self._replacements = 0

    def poll(self, *, is_alone: bool, is_following: bool) -> Decision | None:
        """One look; None to wait.

        Args:
            is_alone: whether the donor trains alone, and waits for nobody.
            is_following: whether it has weights of the receiver, and has answered them.

        Raises:
            PeerError: if the receiver is given up and ``require_peer`` is set.
        """
        if self._wait is None:
            self._wait = self._waiting.begin(self._receiver, "the receiver's next weights")
        if self._waiting.rest.lasts([self._wait]):
            return None
        decision = self._look(is_alone, is_following)
        if decision is not None:
            self._wait.is_over()
        elif (reason := self._wait.gave_up()) is not None:
            logger.warning(
                "TRAINING ALONE: %s. The donor trains its own backbone and head from here on, "
                "until a receiver publishes weights",
                reason,
            )
            return Decision("alone")
        return decision

    def _look(self, is_alone: bool, is_following: bool) -> Decision | None:
        """One look at the receiver's stream."""
        is_new = self._inbox.look(self._receiver)
        if is_new is not None:
            fetched = self._inbox.fetched
            action: Literal["follow", "stop"] = "follow" if is_new else "stop"
            if fetched is None:
                return Decision(action)
            return Decision(action, fetched.header.sequence, fetched.header.tensors_digest)
        is_written = self._waiting.background.check()
        if is_alone:
            return Decision("alone")
        if is_following and is_written:
            reason = self._publisher.last_rejection
            if reason is not None:
                logger.warning("the receiver rejected the last payload (%s)", reason)
                self._replacements += 1
                # The weights that a difference was taken from are not loaded any more.
                may_repeat = self._config.exchange == "gradient"
                is_over = not may_repeat or self._replacements > MAX_REPLACEMENTS
                return Decision("skip" if is_over else "again")
        return None
