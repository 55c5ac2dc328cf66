"""The donors' parts of a receiver's steps, the same on every rank, and what became of them."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch

from toolkit.bridge.config import BridgeConfig
from toolkit.bridge.donors import Donors
from toolkit.bridge.errors import BridgeError, Interrupted, PayloadError
from toolkit.bridge.inbox import Verdict
from toolkit.bridge.interruption import GRACE_SECONDS
from toolkit.bridge.ledger import Ledger
from toolkit.bridge.liveness import ArrivalWatch, PeerWatch, Wait
from toolkit.bridge.own_weights import newest_own_weights, stream_of
from toolkit.bridge.payload import Record
from toolkit.bridge.reading import Reading
from toolkit.bridge.replay import Replay
from toolkit.bridge.transport import DirectoryTransport
from toolkit.bridge.waiting import Waiting
from toolkit.bridge.weights_outbox import WeightsOutbox
from toolkit.parameters import SharedParameters
from toolkit.sharding import shard_like

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Findings:
    """What the main process found in the donors' streams at a step, for all ranks.

    Attributes:
        verdicts: one for each donor.
        heads_alone: where teachers may stand in: the heads whose donors are all away.
        heads_trained: likewise: those that some donor has trained in this run, and the newest
            receiver step that it answered.
    """

    verdicts: tuple[Verdict, ...] = ()
    heads_alone: frozenset[str] = frozenset()
    heads_trained: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def applied(self) -> list[Verdict]:
        """Those verdicts that have a payload to apply."""
        return [verdict for verdict in self.verdicts if verdict.digest is not None]


class Collector:
    """Collects what the donors have for each step, and keeps account of it.

    Args:
        donors: of the run, or of a run that is replayed; None but on the main process, as what
            follows.
        outbox: of this receiver's weights, which are published again where a donor asks for it.
        ledger: where fates are noted.
        transport: of the run.
        waiting: of this job.
        reading: of this job.
        config: the settings.
    """

    def __init__(
        self,
        donors: Donors | Replay | None,
        outbox: WeightsOutbox | None,
        ledger: Ledger,
        *,
        transport: DirectoryTransport,
        waiting: Waiting,
        reading: Reading,
        config: BridgeConfig,
    ) -> None:
        self.donors, self._outbox, self.ledger = donors, outbox, ledger
        self._transport, self._waiting, self._reading = transport, waiting, reading
        self._config = config
        self._to_keep: list[Verdict] = []  # applied, to be kept for good
        self._ages = [0, 0]  # of the payloads applied in this start: their sum, and how many

    @property
    def on_main(self) -> Donors | Replay:
        """The donors, on the main process."""
        assert self.donors is not None
        return self.donors

    # -- one step ---------------------------------------------------------------------------

    def collect(
        self, receiver_step: int, taught_heads: Collection[str], *, may_teach: bool
    ) -> tuple[Findings, list[Record]]:
        """The donors' parts of this step, and the payloads among them. A collective.

        Args:
            receiver_step: the receiver's completed steps.
            taught_heads: heads whose donors have no part in it.
            may_teach: whether teachers may stand in for donors that are away.

        Raises:
            PeerError: if a donor does not come, or is away, and ``require_peer`` is set.
        """
        if self.donors is not None:
            self.donors.begin()
        poll = functools.partial(self.poll, receiver_step, taught_heads, may_teach)
        while True:
            found = self._waiting.decide_on_peers(poll, GRACE_SECONDS)
            records = []
            for verdict in found.applied:
                mine = self.donors.fetched(verdict) if self.donors is not None else None
                record = self._reading.read_everywhere(
                    verdict.donor, verdict.sequence, verdict.digest or "", mine
                )
                if record is None:
                    self._waiting.persist(functools.partial(self._reject, verdict))
                    break
                records.append(record)
            else:
                return found, records

    def poll(
        self, receiver_step: int, taught_heads: Collection[str], may_teach: bool
    ) -> Findings | None:
        """One look at the donors' streams, on the main process; None to wait."""
        assert self._outbox is not None
        donors, num_away = self.on_main, self.on_main.num_away
        if self._waiting.rest.lasts(donors.waits()):
            return None
        if self._waiting.background.check():
            self._outbox.look()
        verdicts = donors.look(receiver_step, taught_heads)
        signal = self._waiting.interruption.signal
        if signal and donors.num_away > num_away:  # by the same signal, maybe
            raise Interrupted(signal)  # sooner than a step without its part
        if self._config.require_peer:
            donors.require_peers()
        if verdicts is None:
            return None
        if not may_teach:
            return Findings(verdicts)
        assert isinstance(donors, Donors)  # a replay has no teachers
        trained = donors.heads_trained(lambda donor: self.ledger.counts(donor)["applied"])
        return Findings(verdicts, donors.heads_alone(), trained)

    def _reject(self, verdict: Verdict) -> None:
        error = PayloadError("unreadable", "not every rank could read the same bytes")
        self.on_main.reject(verdict, error)

    def settle(self, found: Findings) -> dict[str, float]:
        """What was found has been applied: note its fate. Plain floats by tag."""
        applied, metrics = found.applied, {}
        self._ages[0] += sum(verdict.staleness for verdict in applied)
        self._ages[1] += len(applied)
        if self.donors is not None:
            if self._config.keep_payloads:
                self._to_keep = applied
            self.ledger.note(self.donors.settle(found.verdicts))
            metrics = self.donors.event_metrics()
            for donor in self.donors.names:
                for fate, count in self.ledger.counts(donor).items():
                    if count:  # TensorBoard's axis leaves out what is far from many zeros
                        metrics[f"fates/{fate} {donor} (payloads)"] = float(count)
        return metrics

    def write(self) -> None:
        """On the main process: put what was settled on the disk; may be repeated."""
        for verdict in self._to_keep:
            self._transport.keep(verdict.donor, verdict.sequence)
        self._to_keep = []
        self.ledger.flush()

    # -- before the first step ----------------------------------------------------------------

    def first_watch(self) -> PeerWatch:
        """A watch over the first donor that has come, or over who will be."""
        names = self.donors.names if self.donors is not None else []
        if not names:
            return ArrivalWatch(self._transport, "donor")
        return PeerWatch(self._transport, names[0])

    @torch.no_grad()
    def take_heads(self, shared: SharedParameters) -> None:
        """Begin with the heads that the donors have. A collective."""
        wait: list[Wait] = []  # main process

        def find() -> dict[str, tuple[int, str]] | None:
            if self._waiting.rest.lasts(wait):
                return None
            self.on_main.discover()
            found = {}
            for donor in self.on_main.names:
                record = newest_own_weights(self._transport, donor, self._reading.read)
                if record is not None:
                    found[donor] = (record.header.sequence, record.header.tensors_digest)
            if not wait:
                wait.append(self._waiting.begin(self.first_watch(), "the donor's head"))
            if len(found) >= self._config.num_donors:
                return found
            if (reason := wait[0].gave_up()) is None:
                return None
            logger.warning("%s: its head begins as it is", reason)
            return found

        for donor, newest in self._waiting.decide(find, GRACE_SECONDS).items():
            record = self._reading.read_everywhere(stream_of(donor), *newest, None)
            if record is None:
                raise BridgeError(f"not every rank could read the weights of the {donor}")
            for name, parameter in shared.heads[record.header.head].items():
                parameter.copy_(shard_like(record.tensors[name], parameter))
            logger.info("%s begins as the %s has it", record.header.head, donor)

    # -- checkpoints and results --------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold; fit for JSON."""
        return {"ledger": self.ledger.by_donor, **self.on_main.state()}

    @property
    def mean_staleness(self) -> float | None:
        """See :attr:`GradientReceiver.mean_staleness`."""
        total, number = self._ages
        return total / number if number and self._config.follows else None

    def fates(self) -> dict[str, dict[str, int]]:
        """By donor, how many payloads met which fate; see :meth:`GradientReceiver.fates`."""
        fates: dict[str, dict[str, int]] = {}
        for donor in self.donors.names if self.donors is not None else ():
            pending, published = self.on_main.published(donor)
            fates[donor] = {
                **self.ledger.counts(donor),
                "pending": pending,
                "published": published,
                "alien": len(self._transport.alien_names(donor)),
            }
        return fates
