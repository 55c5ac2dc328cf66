"""A donor's payloads on their way to the receiver. Lives on the main process."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from toolkit.bridge.config import BridgeConfig
from toolkit.bridge.digests import Digest
from toolkit.bridge.errors import BridgeError
from toolkit.bridge.payload import Header
from toolkit.bridge.publisher import Publisher
from toolkit.bridge.transport import DirectoryTransport
from toolkit.bridge.weights_inbox import WeightsInbox


class PayloadOutbox:
    """Publishes payloads, and keeps them until the receiver needs them no more.

    Args:
        transport: the run's transport.
        publisher: of the donor's stream.
        inbox: told what was answered.
        config: its budget.
    """

    def __init__(
        self,
        transport: DirectoryTransport,
        publisher: Publisher,
        inbox: WeightsInbox,
        config: BridgeConfig,
    ) -> None:
        self._transport, self._publisher = transport, publisher
        self._inbox, self._config = inbox, config
        self._largest = 0  # bytes
        self._acknowledged, self._num_kept = -1, 0  # when payloads were deleted last, and since

    def publish(
        self, header: Header, tensors: Mapping[str, Tensor], digest: Digest | None = None
    ) -> int:
        """Publish a payload or a skip record; its size in bytes.

        Args:
            header: of the record.
            tensors: by name.
            digest: of them, where it has been begun already.

        Raises:
            BridgeError: if the receiver has left more of them than the budget allows.
        """
        self._prune()
        size = self._publisher.publish(header, tensors, digest)
        self._inbox.note_answer(header, self._publisher.next_sequence - 1)
        self._largest = max(self._largest, size)
        self._num_kept += 1
        return size

    def _prune(self) -> None:
        """Delete what will never be asked for again; refuse to grow beyond the budget."""
        transport, config, stream = self._transport, self._config, self._publisher.stream
        acknowledged = transport.acknowledged(stream)
        if acknowledged != self._acknowledged:  # what is kept is listed then, and not at every step
            self._publisher.prune(acknowledged)
            self._inbox.forget_below(acknowledged)
            self._acknowledged, self._num_kept = acknowledged, len(transport.sequences(stream))
        kept = self._num_kept
        gib = kept * self._largest / 2**30
        if kept > config.payload_budget_files or gib > config.payload_budget_gib:
            raise BridgeError(
                f"{kept} payloads ({gib:.2f} GiB) are unacknowledged, the budget is "
                f"{config.payload_budget_files} (--payload_budget_files) and "
                f"{config.payload_budget_gib:g} GiB (--payload_budget_gib). The receiver needs "
                f"them for its oldest checkpoint: keep fewer (--checkpoints_total_limit)"
            )
