"""The donor's view of the receiver's stream: which weights to take next.

Lives on the main process; the counterpart of ``inbox``, which reads the donor's stream.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from toolkit.bridge.agreement import has_ended
from toolkit.bridge.errors import PayloadError
from toolkit.bridge.liveness import PeerWatch
from toolkit.bridge.payload import Header, Record
from toolkit.bridge.transport import DirectoryTransport

logger = logging.getLogger(__name__)


class WeightsInbox:
    """Finds the newest weights that have no answer yet.

    Args:
        donor: the name of this donor's own stream.
        transport: the run's transport.
        read: reads and verifies a record of the receiver.
        is_resumed: whether this is not the donor's first start.

    Attributes:
        fetched: the weights behind the newest look.
        completed_windows: what the retained payloads say was done in earlier starts.
    """

    def __init__(
        self,
        donor: str,
        transport: DirectoryTransport,
        read: Callable[[int], Record],
        *,
        is_resumed: bool,
    ) -> None:
        self._transport, self._read = transport, read
        self._seen = -1  # the newest record that has been dealt with
        # The weights (receiver step and digest) that a retained payload answers, and its number.
        self._answered: dict[tuple[int, str], int] = {}
        self.fetched: Record | None = None
        self.completed_windows = 0
        refused = transport.rejected(donor)  # a receiver killed then may not have moved it aside
        for sequence in sorted({*transport.sequences(donor)}.difference(refused)):
            try:
                header = transport.read_header(donor, sequence)
            except (FileNotFoundError, PayloadError):
                continue
            self.completed_windows = header.donor_step
            if header.kind != "end":
                self.note_answer(header, sequence)
        # Listed before it is read: a receiver that is resumed meanwhile has newer ones to answer.
        newest = max(transport.sequences("receiver"), default=-1)
        if is_resumed and has_ended(transport, "receiver"):
            # The end of an earlier start of the receiver, which is to be resumed like this job.
            # For a first start it is the end: the receiver has ended while this job joined.
            self._seen = newest

    def look(self, peer: PeerWatch) -> bool | None:
        """One look at the stream; ``fetched`` becomes the weights to take, or None.

        Args:
            peer: told when a new record proves that the receiver lives.

        Returns:
            True for weights to follow, False if the receiver has ended (``fetched`` are its last
            weights, where they are not known yet), None if there is nothing new.
        """
        sequences = self._transport.sequences("receiver")
        new = [sequence for sequence in sequences if sequence > self._seen]
        newest = self._fetch(new[-1]) if new else None
        if newest is None:
            return None
        peer.sign_of_life()
        if newest.header.kind == "end":
            last = self._fetch(new[-2]) if len(new) > 1 else None
            self.fetched = last if last is not None and last.header.kind == "weights" else None
            return False
        if _identity(newest.header) in self._answered:
            self._seen = newest.header.sequence
            return None
        self.fetched = newest
        return True

    def next_records(self) -> list[tuple[str, int]]:
        """The receiver and the number of its newest record, if it is new; of any thread."""
        newest = self._transport.sequences("receiver")[-1:]
        return [("receiver", sequence) for sequence in newest if sequence > self._seen]

    def note_loaded(self, header: Header) -> None:
        """These weights are in the model now."""
        self._seen = header.sequence
        self.fetched = None

    def note_answer(self, header: Header, sequence: int) -> None:
        """Payload ``sequence`` answers the weights that its header names."""
        self._answered[_identity(header)] = sequence

    def forget_below(self, sequence: int) -> None:
        """Payloads below ``sequence`` will not be asked for again."""
        self._answered = {key: n for key, n in self._answered.items() if n >= sequence}

    def _fetch(self, sequence: int) -> Record | None:
        """A record of the receiver, or None where it cannot be used."""
        try:
            record = self._read(sequence)
            if record.header.kind not in ("weights", "end"):
                raise PayloadError("alien", f"a receiver publishes no {record.header.kind!r}")
            return record
        except FileNotFoundError:
            return None  # pruned since the listing: newer ones are there
        except PayloadError as error:
            logger.warning("weights record %d rejected: %s", sequence, error)
            self._transport.reject("receiver", sequence, error.reason, error.detail)
            return None


def _identity(header: Header) -> tuple[int, str]:
    """Which weights a record speaks of, whatever the attempt of the receiver."""
    return header.receiver_step, header.weights_digest
