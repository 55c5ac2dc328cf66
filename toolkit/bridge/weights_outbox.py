"""The receiver's weights on their way to its donors. Lives on the main process."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from toolkit.bridge.digests import Digest
from toolkit.bridge.donors import Donors
from toolkit.bridge.payload import Header
from toolkit.bridge.publisher import Publisher
from toolkit.bridge.replay import Replay

logger = logging.getLogger(__name__)


class WeightsOutbox:
    """Publishes the newest weights, unless nobody is there to read them.

    Args:
        publisher: of the receiver's stream.
        donors: who may read them; told the digest of each version.
        publishes: whether donors ever work at these weights.

    Attributes:
        initial_digest: of the weights before the first step.
    """

    def __init__(self, publisher: Publisher, donors: Donors | Replay, *, publishes: bool) -> None:
        self._publisher, self._donors, self._publishes = publisher, donors, publishes
        self._header: Header | None = None  # of the newest weights taken
        self._tensors: Mapping[str, Tensor] = {}
        self._digest: Digest | None = None
        self._is_on_disk = False
        self.initial_digest = ""

    def forget(self) -> None:
        """Free the weights, before the next ones are taken."""
        self._tensors = {}

    def take(self, header: Header, tensors: Mapping[str, Tensor]) -> None:
        """Take the present weights, whole and on the CPU; :meth:`offer` publishes them.

        They must not change before the first offer, or :meth:`publish`, is over.
        """
        self._header, self._tensors, self._is_on_disk = header, tensors, False
        self._digest = Digest(tensors)
        self._donors.remember(header.receiver_step, "")

    def is_due(self) -> bool:
        """Whether they are to be published: they are not yet, and somebody may read them."""
        return not self._is_on_disk and self._publishes and self._donors.want_weights()

    def look(self) -> None:
        """Publish the weights again where a donor could not read them, or has come back."""
        if self._publisher.last_rejection is not None:
            logger.warning("a donor could not read the weights; publishing them again")
            self._is_on_disk = False
        self._digest = None  # of weights as they were then: a record must be what it says
        self.offer()

    def offer(self) -> None:
        """Publish the weights, unless they are or nobody is there; may be repeated."""
        if self.is_due():
            self._publish()
        self._note_digest()

    def publish(self, is_due: bool) -> None:
        """:meth:`offer` beside the training loop; their digest is known before they are answered.

        Args:
            is_due: as :meth:`is_due` said in the loop's thread.
        """
        self._note_digest()
        if is_due:
            self._publish()

    def _publish(self) -> None:
        assert self._header is not None
        self._publisher.publish_weights(self._header, self._tensors, self._digest)
        self._is_on_disk = True

    def _note_digest(self) -> None:
        """Let the donors' payloads be known by the digest of the weights they were taken at."""
        assert self._header is not None
        if self._digest is None or self._header.weights_digest:
            return  # once: a checkpoint may be gone back to meanwhile
        digest = self._digest.result()
        self._header = self._header.of_weights(digest)
        self._donors.remember(self._header.receiver_step, digest)
        if self._header.receiver_step == 0:
            self.initial_digest = digest
