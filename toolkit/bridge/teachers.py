"""The teachers of a receiver: found, read in the background, and changed between two steps.

A donor of exchange ``distill`` publishes its own weights in a stream beside its own,
``<donor>.weights``. No step waits for them. At most one small collective a step tells the ranks
what to read; they change to it together, once each of them has the same bytes in memory.

Reference: Anil et al., Large scale distributed neural network training through online
distillation, 2018, arXiv 1804.03235.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from toolkit.bridge.control import ControlGroup
from toolkit.bridge.errors import BridgeError, PayloadError
from toolkit.bridge.own_weights import donors_with_weights, stream_of
from toolkit.bridge.payload import Record, check_identity, parse_record
from toolkit.bridge.teacher import Blueprint, Teacher
from toolkit.bridge.transport import READ_SECONDS, DirectoryTransport

logger = logging.getLogger(__name__)

MEMORY = "memory"  # in the place of a donor's name
LOOK_SECONDS = 0.5  # between two looks for newer weights, at least
_FAILED, _PENDING, _READY = 0.0, 1.0, 2.0
_ALLOWANCE_BYTES = 2**20  # of a record, beside its tensors


@dataclasses.dataclass(frozen=True, slots=True)
class Offer:
    """Weights that the main process has verified and that all ranks shall read."""

    donor: str
    head: str
    sequence: int
    digest: str
    donor_step: int


@dataclasses.dataclass(slots=True)
class Working:
    """A teacher with the weights that it has.

    Attributes:
        teacher: the model.
        offer: which weights they are.
        age: receiver steps since they were taken.
    """

    teacher: Teacher
    offer: Offer
    age: int = 0


class Teachers:
    """Every donor's newest weights, the same on all ranks.

    Args:
        transport: the run's transport.
        control: the job's control group.
        run_id: of the run.
        blueprints: of the teachers, by head; a teacher is made when it is needed.

    Attributes:
        at_work: the heads that are taught, at first all. The same on all ranks.
        trained: by head, the newest receiver step that its donors' gradients are of. What a donor
            has trained by itself from older weights is of no use: the receiver's own head is newer.
        working: by donor, its teacher.
        misfit: main process: why the newest weights cannot be loaded, where they are of another
            model.
    """

    def __init__(
        self,
        transport: DirectoryTransport,
        control: ControlGroup,
        *,
        run_id: str,
        blueprints: Mapping[str, Blueprint],
    ) -> None:
        self._transport, self.control = transport, control
        self._run_id, self._blueprints = run_id, blueprints
        self._max_bytes = _ALLOWANCE_BYTES + max(
            blueprint.num_bytes + 1024 * blueprint.num_tensors for blueprint in blueprints.values()
        )
        self.at_work = frozenset(blueprints)
        self.trained: Mapping[str, int] = {}
        self.working: dict[str, Working] = {}
        self.misfit: str | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher")
        # main process: a look under way, when the next may begin, and what is of no use
        self._looking: Future[tuple[Offer, Record] | None] | None = None
        self._next_look, self._turn = 0.0, 0
        self._useless: set[tuple[str, int]] = set()
        self._offered: dict[str, int] = {}
        # all ranks: what is being read
        self._offer: Offer | None = None
        self._incoming: Future[Record | None] | None = None

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that have a teacher at work, in order."""
        taught = {working.offer.head for working in self.working.values()}
        return tuple(head for head in self._blueprints if head in self.at_work and head in taught)

    def of(self, head: str) -> dict[str, Teacher]:
        """The teachers of one head by donor."""
        return {d: w.teacher for d, w in self.working.items() if w.offer.head == head}

    @torch.no_grad()
    def remember(self, head: str, weights: Mapping[str, Tensor], receiver_step: int) -> None:
        """Let the receiver's own present weights teach a head, unless a donor has left its own.

        So does a head that nobody trains any more go on saying what it said, while the backbone
        below it moves (Li and Hoiem, Learning without Forgetting, 2016, arXiv 1606.09282).

        Args:
            head: its name.
            weights: what this rank has, by name.
            receiver_step: after which it has them.

        Raises:
            BridgeError: on all ranks, if one of them cannot make a teacher.
        """
        if self.of(head):
            return
        teacher = self._build(head)
        teacher.copy_(weights)
        offer = Offer(MEMORY, head, -1, "", receiver_step)
        self.working[f"{MEMORY} of {head}"] = Working(teacher, offer)

    def forget(self, head: str) -> None:
        """Dismiss the teachers of a head: what they know will be old when one is needed again."""
        for name in [name for name, w in self.working.items() if w.offer.head == head]:
            del self.working[name]

    # -- between two steps --------------------------------------------------------------------

    def refresh(self) -> None:
        """Take newer weights, if all ranks have them in memory.

        A collective where some head is taught; it never waits.
        """
        if not self.at_work and self._offer is None:
            return
        if self._offer is not None:
            self._finish()
        elif (offer := self.control.on_main(self.poll)) is not None:
            self.begin(offer)

    def count_step(self) -> None:
        """Another receiver step has happened."""
        for working in self.working.values():
            working.age += 1

    @property
    def is_looking(self) -> bool:
        """Whether a look is under way whose end :meth:`poll` has not seen."""
        return self._looking is not None

    def poll(self) -> Offer | None:
        """On the main process: weights that it has read and that are newer. Never waits."""
        if self._looking is None:
            if time.monotonic() >= self._next_look:
                self._looking = self._thread.submit(self._look)
            return None
        if not self._looking.done():
            return None
        try:
            found = self._looking.result()
        except OSError:  # the disk fails just now
            found = None
        self._looking, self._next_look = None, time.monotonic() + LOOK_SECONDS
        if found is None:
            return None
        offer, record = found
        self._offered[offer.donor] = offer.sequence
        self._incoming = Future()
        self._incoming.set_result(record)
        return offer

    def begin(self, offer: Offer) -> None:
        """On all ranks: begin to read what the main process has offered."""
        self._offer = offer
        if self._incoming is None:
            self._incoming = self._thread.submit(self._read_until, offer)

    def take(self) -> None:
        """Wait until what was offered is taken or given up. A collective."""
        while self._offer is not None:
            self._finish()
            time.sleep(0.001 if self._offer is None else 0.02)

    def _finish(self) -> None:
        assert self._offer is not None
        assert self._incoming is not None
        record = self._incoming.result() if self._incoming.done() else None
        state = _READY if record is not None else _FAILED if self._incoming.done() else _PENDING
        outcome = self.control.min(state)
        if outcome == _PENDING:
            return
        offer, self._offer, self._incoming = self._offer, None, None
        if outcome == _FAILED:
            if self.control.is_main_process:
                error = PayloadError("unreadable", "not every rank could read the same bytes")
                self._reject(offer.donor, offer.sequence, error)
            return
        assert record is not None
        if offer.head not in self.at_work:
            self._offered[offer.donor] = offer.sequence - 1  # its donor has not ended, or is back
            return
        self.working.pop(f"{MEMORY} of {offer.head}", None)
        old = self.working.pop(offer.donor, None)
        is_same = old is not None and old.offer.head == offer.head
        teacher = old.teacher if old and is_same else self._build(offer.head)
        teacher.copy_(record.tensors)
        self.working[offer.donor] = Working(teacher, offer)
        logger.info("the %s teaches with its weights of step %d", offer.donor, offer.donor_step)

    def _build(self, head: str) -> Teacher:
        """A new teacher, on all ranks or on none. A collective."""
        teacher: Teacher | None = None
        failure: Exception | None = None
        try:
            teacher = self._blueprints[head].build()
        except Exception as error:  # a factory is the user's: its error must not part the ranks
            failure = error
        if not self.control.agree(teacher is not None):
            reason = failure or "another rank could not make a teacher"
            raise BridgeError(str(reason)) from failure
        assert teacher is not None
        return teacher

    # -- in the background --------------------------------------------------------------------

    def _look(self) -> tuple[Offer, Record] | None:
        """Find the newest weights that were not offered yet, of one donor after another."""
        donors = donors_with_weights(self._transport)
        self._turn += 1
        for place in range(len(donors)):
            donor = donors[(self._turn + place) % len(donors)]
            for sequence in reversed(self._transport.sequences(stream_of(donor))):
                if sequence <= self._offered.get(donor, -1):
                    break
                if (donor, sequence) in self._useless:
                    continue
                try:
                    record = self._read(donor, sequence)
                except FileNotFoundError:
                    continue  # pruned since the listing, or the disk fails just now
                except PayloadError as error:
                    self._reject(donor, sequence, error)
                    continue
                header = record.header
                if header.receiver_step < self.trained.get(header.head, 0):
                    self._useless.add((donor, sequence))
                    break
                digest = header.tensors_digest
                return Offer(donor, header.head, sequence, digest, header.donor_step), record
        return None

    def _read(self, donor: str, sequence: int) -> Record:
        """Read and verify weights; raises as :meth:`DirectoryTransport.read` does."""
        stream = stream_of(donor)
        data = self._transport.read(stream, sequence, max_bytes=self._max_bytes)
        record = parse_record(data, self._transport.signer)
        header = record.header
        check_identity(header, run_id=self._run_id, job=stream, sequence=sequence)
        if header.kind != "weights":
            raise PayloadError("alien", f"a stream of weights has no {header.kind!r}")
        if header.head not in self._blueprints:
            raise PayloadError("schema", f"a teacher for {header.head!r}, which is not shared")
        self._blueprints[header.head].check(record, donor)
        return record

    def _read_until(self, offer: Offer) -> Record | None:
        """What the main process has read, on another rank; None if it cannot be had."""
        deadline = time.monotonic() + READ_SECONDS
        while True:
            try:
                record = self._read(offer.donor, offer.sequence)
                return record if record.header.tensors_digest == offer.digest else None
            except (FileNotFoundError, PayloadError) as error:
                if time.monotonic() > deadline:
                    logger.warning("rank cannot read weights %d: %s", offer.sequence, error)
                    return None
                time.sleep(0.05)

    def _reject(self, donor: str, sequence: int, error: PayloadError) -> None:
        """Refuse weights for good; the teacher that there is goes on."""
        self._useless.add((donor, sequence))
        stream = stream_of(donor)
        try:
            if sequence not in self._transport.sequences(stream):
                return  # pruned meanwhile: newer ones are there
            if error.reason == "schema":
                self.misfit = f"weights {sequence} of the {donor}: {error.detail}"
            logger.warning("weights %d of the %s rejected: %s", sequence, donor, error)
            self._transport.reject(stream, sequence, error.reason, error.detail)
        except OSError as failure:  # they stay where they are, and are not looked at again
            logger.warning("cannot put weights %d of the %s aside: %s", sequence, donor, failure)

    # -- the end ------------------------------------------------------------------------------

    def state(self) -> Mapping[str, Any]:
        """Which teachers are at work, for a checkpoint; a resume takes the newest there are."""
        return {donor: dataclasses.asdict(w.offer) for donor, w in self.working.items()}

    def close(self) -> None:
        """Read nothing any more."""
        self._thread.shutdown(wait=True, cancel_futures=True)
