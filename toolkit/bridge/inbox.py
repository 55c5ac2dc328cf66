"""The receiver's view of one donor's stream: what may be applied to this step, and what not.

Lives on the main process. Nothing that it finds out counts until the optimizer step happened
(:meth:`Inbox.settle`): after a skipped step the next look begins at the same cursor again.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor

from toolkit.bridge.errors import PayloadError
from toolkit.bridge.ledger import Entry
from toolkit.bridge.liveness import PeerWatch
from toolkit.bridge.payload import Header, Kind, Record, check_sum
from toolkit.bridge.reasons import Drop, Fate
from toolkit.bridge.sentinel import OF_ONE_PAYLOAD, Sentinel
from toolkit.bridge.transport import DirectoryTransport

logger = logging.getLogger(__name__)

MISSING_LOOKS = 3  # a number that was passed over is lost if it is not there at this many looks ...
MISSING_SECONDS = 1.0  # ... this far apart (a network disk may show files late)

Outcome = Fate | Literal["ended"]


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What one receiver step does with the donor's stream.

    Attributes:
        donor: whose stream it is.
        next_cursor: where the next step begins to look.
        answered: the newest receiver step that the donor has answered with a payload or a skip.
        entries: the fates of the payloads that this step settles.
        sequence: the payload to apply, if ``digest`` is set.
        digest: digest of its tensors; None for a step on the receiver's own gradient only.
        staleness: receiver steps since the weights that it was taken at.
    """

    donor: str
    next_cursor: int
    answered: int
    entries: tuple[Entry, ...]
    sequence: int = -1
    digest: str | None = None
    staleness: int = 0


class Inbox:
    """Reads a donor's stream in order, and judges each payload.

    Args:
        donor: the name of its stream.
        transport: the run's transport.
        read: reads and verifies record ``sequence`` of the donor.
        expected: by head, the parameters that a gradient must fit, by name.
        kind: what the donor sends: gradients or differences.
        unit: the unit that its count must have.
        sentinel: watches what it sends.
        rejects_alarms: whether a payload that raises an alarm is rejected.
        max_staleness: receiver steps that its weights may be old; None for payloads that were not
            taken at the receiver's weights, which are all taken, one a step, and never waited for.
        digests: of the weights, by receiver step; the newest few, kept up to date by the owner.
            Empty while it is computed: what names that step is judged later.
        is_new: whether the donor came after this start of the receiver: its stream begins at the
            beginning, and all of its records say that it lives.

    Attributes:
        cursor: the number of the first payload without a fate.
        answered: the newest receiver step that the donor has answered with a payload or a skip.
        donor_is_away: whether there is no point in waiting: the donor ended, or waiting for it was
            given up. A new payload mends it.
        fetched: the record behind the newest verdict with a digest.
    """

    def __init__(
        self,
        donor: str,
        *,
        transport: DirectoryTransport,
        read: Callable[[int], Record],
        expected: Mapping[str, Mapping[str, Tensor]],
        kind: Kind,
        unit: str,
        sentinel: Sentinel,
        rejects_alarms: bool = False,
        max_staleness: int | None,
        digests: Mapping[int, str],
        is_new: bool = False,
    ) -> None:
        self._donor, self._transport, self._read = donor, transport, read
        self._expected, self._kind, self._unit = expected, kind, unit
        self.sentinel, self._rejects_alarms = sentinel, rejects_alarms
        self._max_staleness = max_staleness
        self._digests = digests
        self.answered = -1
        known = [] if is_new else transport.sequences(donor)
        # Numbers below it were published before this start and say nothing about the donor's life.
        # A stream that is never waited for is taken as it comes: it is over where its end is read.
        self._first_unseen = self._newest_of(known) + 1 if self.is_waited_for else 0
        self._judged: dict[int, tuple[Outcome, str, Record | None]] = {}  # since the cursor moved
        self._missing, self._missing_looks, self._next_missing_look = -1, 0, 0.0
        # A receiver that starts without a checkpoint begins with what the donor still keeps, or
        # with what an earlier start refused before it settled anything.
        self._pruned_below = transport.acknowledged(donor)
        refused = [] if is_new else transport.rejected(donor)
        not_settled = [number for number in refused if number >= self._pruned_below]
        self.cursor = min([self._oldest_of(known), *not_settled])
        self._start = self.cursor
        self._num_ends = 0  # numbers below the cursor that are ends, and no payloads
        self.donor_is_away = False
        self.fetched: Record | None = None

    @property
    def is_waited_for(self) -> bool:
        """Whether a step may wait for this donor's answer."""
        return self._max_staleness is not None

    def look(self, receiver_step: int, peer: PeerWatch) -> Verdict | None:
        """Read on from the cursor, up to the first payload to apply.

        Args:
            receiver_step: the receiver's completed steps.
            peer: told when a new record proves that the donor lives.

        Returns:
            A verdict, or None if the donor's answer must be waited for.
        """
        verdict = Verdict(self._donor, self.cursor, self.answered, ())
        while (judged := self._judge(verdict.next_cursor, receiver_step)) is not None:
            outcome, reason, record = judged
            sequence, answered, entries = verdict.next_cursor, verdict.answered, verdict.entries
            self._note_life(sequence, outcome, receiver_step, peer)
            applied = record.header.tensors_digest if record and outcome == "applied" else ""
            if outcome != "ended":
                entry = Entry(self._donor, sequence, outcome, receiver_step, reason, applied)
                entries = (*entries, entry)
            if record is not None and outcome in ("applied", "skipped"):
                at = record.header.receiver_step
                answered = max(answered, at)
                if outcome == "applied":
                    self.fetched = record
                    digest, staleness = record.header.tensors_digest, receiver_step - at
                    return Verdict(
                        self._donor, sequence + 1, answered, entries, sequence, digest, staleness
                    )
            verdict = Verdict(self._donor, sequence + 1, answered, entries)
        if self._max_staleness is None or self.donor_is_away:
            return verdict
        in_time = verdict.answered >= receiver_step - self._max_staleness
        return verdict if peer.seen and in_time else None

    def pass_over(self) -> Verdict:
        """Leave the stream alone in this step."""
        return Verdict(self._donor, self.cursor, self.answered, ())

    def give_up(self, receiver_step: int, peer: PeerWatch) -> Verdict | None:
        """Wait no longer, for this step and until the donor publishes again.

        Returns:
            A verdict, or None where the donor published at this very moment: wait on.
        """
        self.donor_is_away = True
        return self.look(receiver_step, peer)

    def has_news(self) -> bool:
        """Whether the donor has published since it was last heard of, after a time away.

        The end of one that is away changes nothing.
        """
        for sequence in reversed(self._transport.sequences(self._donor)):
            if sequence < self._first_unseen:
                break
            try:
                return self._transport.read_header(self._donor, sequence).kind != "end"
            except PayloadError:
                continue  # an alien file, which stays, or a damaged record, which others follow
            except FileNotFoundError:
                return True  # the next look finds out
        return False

    def settle(self, verdict: Verdict) -> tuple[Entry, ...]:
        """The step happened: move the cursor; the fates that are final now."""
        self._num_ends += verdict.next_cursor - self.cursor - len(verdict.entries)
        self.cursor, self.answered = verdict.next_cursor, verdict.answered
        if verdict.digest is not None and self.fetched is not None:
            self.sentinel.remember(self.fetched)
        self._judged.clear()
        return verdict.entries

    def reject(self, sequence: int, error: PayloadError) -> None:
        """Refuse a record for good: keep it aside, tell the donor, go on without it."""
        logger.warning("payload %d of the %s rejected: %s", sequence, self._donor, error)
        self._transport.reject(self._donor, sequence, error.reason, error.detail)
        self._judged[sequence] = ("rejected", error.reason, None)

    def pending(self) -> int:
        """Payloads published that have no fate yet."""
        count = 0
        donor, transport = self._donor, self._transport
        there = {*transport.sequences(donor), *transport.rejected(donor)}
        for sequence in sorted(there):
            if sequence >= self.cursor:
                try:
                    count += self._read(sequence).header.kind != "end"
                except (FileNotFoundError, PayloadError):
                    count += 1
        return count

    def num_settled(self) -> int:
        """Numbers of the donor's stream that this receiver has passed and that were payloads."""
        return self.cursor - self._start - self._num_ends

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold; fit for JSON."""
        return {
            "cursor": self.cursor,
            "answered": self.answered,
            "start": self._start,
            "num_ends": self._num_ends,
            "sentinel": self.sentinel.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state`."""
        self.cursor, self.answered = state["cursor"], state["answered"]
        self._start, self._num_ends = state["start"], state["num_ends"]
        self.sentinel.load_state(state["sentinel"])
        self._judged.clear()

    def _judge(self, sequence: int, step: int) -> tuple[Outcome, str, Record | None] | None:
        """What to do with one record at receiver step ``step``; None if it is not there yet."""
        if sequence not in self._judged:
            if (reason := self._transport.rejection(self._donor, sequence)) is not None:
                self._judged[sequence] = ("rejected", reason, None)
            else:
                try:
                    record = self._read(sequence)
                    if self._is_of_newest(record.header):
                        return None
                    self._judged[sequence] = self._judge_record(record, step)
                except FileNotFoundError:
                    if sequence < self._pruned_below:
                        # A resume from an older checkpoint than those the payloads were kept for.
                        return _dropped("pruned")
                    if not self._is_lost(sequence):
                        return None
                    self.reject(sequence, PayloadError("missing", "a later payload is there"))
                except PayloadError as error:
                    self.reject(sequence, error)
        return self._judged[sequence]

    def _is_of_newest(self, header: Header) -> bool:
        """Whether it names weights whose digest is not known yet, as an earlier start's may."""
        is_checked = self._max_staleness is not None and header.kind != "end"
        return is_checked and self._digests.get(header.receiver_step) == ""

    def _judge_record(self, record: Record, step: int) -> tuple[Outcome, str, Record | None]:
        header = record.header
        if header.kind == "end":
            return "ended", "", None
        if header.kind == self._kind:
            if header.head not in self._expected:
                raise PayloadError("schema", f"a payload for {header.head!r}, which is not shared")
            check_sum(record, self._expected[header.head], self._unit)
        elif header.kind != "skip":
            raise PayloadError(
                "alien", f"a donor publishes no {header.kind!r} where {self._kind!r} is exchanged"
            )
        if self._max_staleness is not None:
            if header.receiver_step < step - self._max_staleness:
                return _dropped("stale")
            # The step and the digest together: a step may leave the weights as they are (a learning
            # rate of 0), and a resumed receiver may come to a step with other weights.
            if self._digests.get(header.receiver_step) != header.weights_digest:
                return _dropped("superseded")
        if header.kind == "skip":
            return "skipped", "", record
        alarms = [alarm for alarm in self.sentinel.judge(record) if alarm in OF_ONE_PAYLOAD]
        if alarms and self._rejects_alarms:
            detail = f"{' and '.join(alarms)}, and on_alarm is 'reject'"
            self.reject(header.sequence, PayloadError("alarm", detail))
            self.sentinel.raise_alarms(tuple(alarms))  # once, however often the disk refused that
            return "rejected", "alarm", None
        return "applied", "", record

    def _note_life(self, sequence: int, outcome: Outcome, step: int, peer: PeerWatch) -> None:
        if sequence < self._first_unseen:
            return
        self._first_unseen = sequence + 1
        peer.sign_of_life()
        if outcome == "ended":
            logger.warning(
                "TRAINING ALONE: the %s has ended. From receiver step %d on its head and its "
                "part of the backbone's gradient are missing", self._donor, step,
            )  # fmt: skip
        elif self.donor_is_away:
            logger.info("the %s is back at receiver step %d", self._donor, step)
        self.donor_is_away = outcome == "ended"

    def _is_lost(self, sequence: int) -> bool:
        """Whether a number was passed over: later payloads are there, and it stays away."""
        now = time.monotonic()
        if sequence != self._missing:
            # Mostly it will come in a moment: the listing, of all that the donor keeps, can wait.
            self._missing, self._missing_looks = sequence, 1
            self._next_missing_look = now + MISSING_SECONDS
            return False
        if now < self._next_missing_look:
            return False
        self._next_missing_look = now + MISSING_SECONDS
        later = [number for number in self._transport.sequences(self._donor) if number > sequence]
        passed_over = any(map(self._is_record, later))
        self._missing_looks = self._missing_looks + 1 if passed_over else 0
        return self._missing_looks >= MISSING_LOOKS

    def _oldest_of(self, known: list[int]) -> int:
        """Where to begin: an alien file may lie before or after what the donor keeps."""
        if known and self._is_record(known[0]):
            return known[0]
        return min([*known[:1], self._pruned_below])

    def _newest_of(self, known: list[int]) -> int:
        """The highest number that the donor wrote a record under; -1 for none."""
        return next((number for number in reversed(known) if self._is_record(number)), -1)

    def _is_record(self, sequence: int) -> bool:
        """Whether the donor wrote it: an alien file says nothing about the numbers before it."""
        try:
            self._read(sequence)
        except (FileNotFoundError, PayloadError):
            return False
        return True


def _dropped(reason: Drop) -> tuple[Outcome, str, None]:
    return "dropped", reason, None
