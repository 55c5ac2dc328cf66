"""A donor's payloads on their way to the receiver. Lives on the main process."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from toolkit.bridge.compression import ErrorFeedback, round_values
from toolkit.bridge.config import BridgeConfig
from toolkit.bridge.digests import Digest
from toolkit.bridge.errors import BridgeError
from toolkit.bridge.payload import Header
from toolkit.bridge.publisher import Publisher
from toolkit.bridge.transport import DirectoryTransport
from toolkit.bridge.weights_inbox import WeightsInbox

logger = logging.getLogger(__name__)

_FEEDBACK_FILE = "gradient_bridge_residual.safetensors"  # in a checkpoint


class PayloadOutbox:
    """Publishes payloads, and keeps them until the receiver needs them no more.

    Args:
        transport: the run's transport.
        publisher: of the donor's stream.
        inbox: told what was answered.
        config: its budget, and how payloads are compressed.

    Attributes:
        feedback: what top-k payloads have left out; None for others.
        newest_bytes: the size of the newest payload published.
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
        self.feedback = ErrorFeedback(config.topk_ratio) if config.compression == "topk" else None
        self._largest = 0  # bytes
        self.newest_bytes = 0
        self._acknowledged, self._num_kept = -1, 0  # when payloads were deleted last, and since

    def publish(
        self, header: Header, tensors: Mapping[str, Tensor], digest: Digest | None = None
    ) -> int:
        """Publish a payload or a skip record; its size in bytes.

        After an ``OSError`` it may be repeated with the same one.

        Args:
            header: of the record.
            tensors: by name, not compressed.
            digest: of them, where they are not to be compressed and it has been begun already.

        Raises:
            BridgeError: if the receiver has left more of them than the budget allows.
        """
        self.write(header, tensors, digest)
        self._inbox.note_answer(header, self._publisher.next_sequence - 1)
        return self.newest_bytes

    def write(
        self, header: Header, tensors: Mapping[str, Tensor], digest: Digest | None = None
    ) -> None:
        """:meth:`publish`, but for the note of what was answered; of any thread."""
        self._prune()
        residual: Tensor | None = None
        if self.feedback is not None:
            self.feedback.settle(self._is_rejected)
        if header.kind != "skip":
            header = dataclasses.replace(header, compression=self._config.compression)
            if self.feedback is not None:
                divisor = 1.0 if header.kind == "delta" else header.count
                tensors, residual = self.feedback.encode(tensors, divisor)
            elif header.compression == "bf16":
                tensors = round_values(tensors)
        self.newest_bytes = self._publisher.publish(header, tensors, digest)
        if self.feedback is not None and residual is not None:
            self.feedback.note_sent(self._publisher.next_sequence - 1, residual)
        self._largest = max(self._largest, self.newest_bytes)
        self._num_kept += 1

    def save_feedback(self, directory: Path) -> None:
        """Put what payloads have left out into a checkpoint.

        In a file of its own: Accelerate refuses a checkpoint with another number of registered
        objects, and compression is chosen at each start; and only the main process needs it.
        """
        if self.feedback is not None:
            tensors, sequence = self.feedback.state()
            save_file(tensors, directory / _FEEDBACK_FILE, {"newest": str(sequence)})

    def load_feedback(self, directory: Path, num_later: int) -> None:
        """Go on from a checkpoint, if it is of this moment.

        Args:
            directory: of the checkpoint.
            num_later: accumulation windows since then. What their payloads have sent of the
                residual, and added to it, is not known: it would be applied twice.
        """
        path, lost = directory / _FEEDBACK_FILE, ""
        if not path.is_file():
            lost = "has none of it" if self.feedback is not None else ""
        elif self.feedback is None:
            lost = f"has it, and this start has compression {self._config.compression!r}"
        elif num_later:
            lost = "is older than the newest payload"
        if lost:
            logger.warning(
                "what earlier payloads have left out (compression 'topk') is lost: the checkpoint "
                "%s %s", directory, lost,
            )  # fmt: skip
        if lost or self.feedback is None:
            return
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.feedback.load_state(tensors, int(file.metadata()["newest"]))

    def _is_rejected(self, sequence: int) -> bool:
        return self._transport.rejection(self._publisher.stream, sequence) is not None

    def _prune(self) -> None:
        """Delete what will never be asked for again; refuse to grow beyond the budget.

        Raises:
            BridgeError: if the receiver has left more payloads than the budget allows.
        """
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
