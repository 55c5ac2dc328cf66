"""The donors of a run, as the receiver's main process sees them.

One :class:`Inbox` and one watch over its life for each. A donor is found once it has opened its
stream, whenever that is; a step waits for those that live.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from toolkit.bridge.agreement import has_ended, read_claim
from toolkit.bridge.config import JOB_NAME, BridgeConfig
from toolkit.bridge.errors import PayloadError, PeerError
from toolkit.bridge.inbox import Inbox, Verdict
from toolkit.bridge.ledger import Entry
from toolkit.bridge.liveness import ArrivalWatch, PeerWatch, Wait
from toolkit.bridge.own_weights import stream_of
from toolkit.bridge.payload import Record
from toolkit.bridge.sentinel import Sentinel
from toolkit.bridge.transport import DirectoryTransport

logger = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class _Donor:
    """One donor, and how far this step has come with it."""

    inbox: Inbox
    peer: PeerWatch
    head: str
    wait: Wait | None = None
    verdict: Verdict | None = None

    @property
    def is_away(self) -> bool:
        """Whether it was given up or has ended, and has not published since."""
        return self.inbox.donor_is_away and not self.inbox.has_news()


class Donors:
    """Finds the donors of a run and asks each of them for its part of every step.

    Args:
        transport: the run's transport.
        open_inbox: makes the inbox of a donor that was found, from its name, the digests of the
            weights by receiver step, which are kept up to date here, and whether the donor came
            after this start of the receiver.
        open_wait: begins the wait for a donor, from its watch and what is waited for.
        head_of: the head that a donor trains, by the donor's name.
        num_expected: donors that must have been found before a step, until waiting is given up.
        max_staleness: receiver steps that a payload's weights may be old.
        peer_wait: seconds without a sign of life after which a donor does not count as alive.
    """

    def __init__(
        self,
        transport: DirectoryTransport,
        *,
        open_inbox: Callable[[str, Mapping[int, str], bool], Inbox],
        open_wait: Callable[[PeerWatch, str], Wait],
        head_of: Callable[[str], str],
        num_expected: int,
        max_staleness: int,
        peer_wait: float,
    ) -> None:
        self._transport, self._open_inbox, self._open_wait = transport, open_inbox, open_wait
        self._num_expected, self._max_staleness = num_expected, max_staleness
        self._peer_wait, self._head_of = peer_wait, head_of
        self._donors: dict[str, _Donor] = {}
        self._digests: dict[int, str] = {}
        self._missing: Wait | None = None  # for donors that were never found
        self._has_started = False
        self.discover()
        self._has_started = True

    # -- who is there -----------------------------------------------------------------------

    def discover(self) -> None:
        """Take in the donors that have come since the last call."""
        for name in self._transport.streams():
            is_donor = name != "receiver" and JOB_NAME.fullmatch(name)
            if is_donor and name not in self._donors and self._has_claimed(name):
                self._add(name)

    def _has_claimed(self, name: str) -> bool:
        """Whether it is a job's stream and no mere directory, which anybody can make."""
        transport = self._transport
        return not transport.signer.has_key or read_claim(transport, name) is not None

    def _add(self, name: str) -> None:
        inbox = self._open_inbox(name, self._digests, self._has_started)
        self._donors[name] = _Donor(inbox, PeerWatch(self._transport, name), self._head_of(name))
        if self._digests:
            newest = max(list(self._digests))  # a copy: weights may be published meanwhile
            logger.info("the %s joins at receiver step %d", name, newest)

    @property
    def names(self) -> list[str]:
        """The donors found, in the order in which they were."""
        return list(self._donors)

    @property
    def num_away(self) -> int:
        """How many of them have ended or were given up."""
        return sum(donor.inbox.donor_is_away for donor in self._donors.values())

    def want_weights(self) -> bool:
        """Whether somebody may read the next weights."""
        for donor in self._donors.values():
            donor.peer.observe()
            if not donor.inbox.donor_is_away or donor.peer.is_alive(self._peer_wait):
                return True
        return len(self._donors) < self._num_expected

    def require_peers(self) -> None:
        """End where a donor is away.

        Raises:
            PeerError: naming it.
        """
        for name, donor in self._donors.items():
            if donor.inbox.donor_is_away:
                raise PeerError(f"the {name} has ended or fell silent, and --require_peer is set")

    # -- one step ---------------------------------------------------------------------------

    def begin(self) -> None:
        """Ask all donors anew."""
        for donor in self._donors.values():
            donor.wait = donor.verdict = None

    def heads_trained(self, applied: Callable[[str], int]) -> dict[str, int]:
        """The heads that some donor has trained, and the newest receiver step that it answered.

        Args:
            applied: how many payloads of a donor were applied, by its name.
        """
        trained: dict[str, int] = {}
        for name, donor in self._donors.items():
            if applied(name):
                trained[donor.head] = max(trained.get(donor.head, -1), donor.inbox.answered)
        return trained

    def heads_alone(self) -> frozenset[str]:
        """The heads whose donors are all away: they have ended, or were given up.

        A donor that has published again is back.
        """
        self.discover()
        lively = {d.head for d in self._donors.values() if not d.is_away}
        return frozenset(d.head for d in self._donors.values()) - lively

    def waits(self) -> list[Wait]:
        """The waits of this step that are not over; none before its first look."""
        waits = [donor.wait for donor in self._donors.values() if donor.verdict is None]
        if len(self._donors) < self._num_expected:
            waits.append(self._missing)
        begun = [wait for wait in waits if wait is not None]
        return begun if len(begun) == len(waits) else []

    def look(self, receiver_step: int, without: Collection[str] = ()) -> tuple[Verdict, ...] | None:
        """One look at every stream that has no answer yet.

        Args:
            receiver_step: the receiver's completed steps.
            without: heads whose donors have no part in this step.

        Returns:
            Each donor's part of this step, or None while one of them must be waited for.

        Raises:
            PeerError: if one is given up and a peer is required.
        """
        self.discover()
        for name, donor in self._donors.items():
            if donor.verdict is None and donor.head in without:
                donor.verdict = donor.inbox.pass_over()
            elif donor.verdict is None:
                donor.verdict = self._ask(name, donor, receiver_step)
        if len(self._donors) < self._num_expected and not self._gives_up_finding(receiver_step):
            return None
        verdicts = [donor.verdict for donor in self._donors.values()]
        found = [verdict for verdict in verdicts if verdict is not None]
        return tuple(found) if len(found) == len(verdicts) else None

    def _ask(self, name: str, donor: _Donor, step: int) -> Verdict | None:
        if donor.wait is None:
            donor.wait = self._open_wait(
                donor.peer, f"the {name}'s gradient at receiver step {step}"
            )
        verdict = donor.inbox.look(step, donor.peer)
        if verdict is None and (reason := donor.wait.gave_up()) is not None:
            verdict = donor.inbox.give_up(step, donor.peer)
            if verdict is not None:
                _warn(reason, step)
        elif verdict is not None:
            donor.wait.is_over()
            if not donor.inbox.is_waited_for and verdict.digest is None:
                self._watch_unawaited(name, donor, step)
        return verdict

    def _watch_unawaited(self, name: str, donor: _Donor, step: int) -> None:
        """Say so, once, where a donor for which no step waits has fallen silent."""
        donor.peer.observe()
        if not donor.inbox.donor_is_away and donor.peer.silent_seconds >= self._peer_wait:
            donor.inbox.donor_is_away = True
            _warn(f"the {name} fell silent for {self._peer_wait:g} s", step)

    def _gives_up_finding(self, step: int) -> bool:
        """Whether donors that were never found are waited for no longer."""
        if self._missing is None:
            name = "donor" if "donor" not in self._donors else "further donor"
            watch = ArrivalWatch(self._transport, name)
            what = f"the {name}'s gradient at receiver step {step}"
            self._missing = self._open_wait(watch, what)
        reason = self._missing.gave_up()
        if reason is not None:
            _warn(reason, step)
            self._num_expected = len(self._donors)
        return reason is not None

    def next_records(self) -> list[tuple[str, int]]:
        """The donors and numbers of the payloads that are next and are there; of any thread."""
        following = [(name, donor.inbox.cursor) for name, donor in list(self._donors.items())]
        return [record for record in following if self._transport.has(*record)]

    def fetched(self, verdict: Verdict) -> Record | None:
        """The record that a verdict of this step speaks of."""
        return self._donors[verdict.donor].inbox.fetched

    def reject(self, verdict: Verdict, error: PayloadError) -> None:
        """Refuse the record that a verdict speaks of, and ask that donor again."""
        donor = self._donors[verdict.donor]
        donor.inbox.reject(verdict.sequence, error)
        donor.verdict = None

    def settle(self, verdicts: Iterable[Verdict]) -> list[Entry]:
        """The step happened; the fates that are final now."""
        return [e for v in verdicts for e in self._donors[v.donor].inbox.settle(v)]

    def remember(self, receiver_step: int, digest: str) -> None:
        """Note the digest of the weights after ``receiver_step`` steps; forget the too old ones.

        It is empty while it is not known yet.
        """
        self._digests[receiver_step] = digest
        for step in [s for s in self._digests if s < receiver_step - self._max_staleness]:
            del self._digests[step]

    # -- what a checkpoint holds, and what was counted ----------------------------------------

    def cursors(self) -> dict[str, int]:
        """By donor, the number of the first payload without a fate."""
        return {name: donor.inbox.cursor for name, donor in self._donors.items()}

    def published(self, name: str) -> tuple[int, int]:
        """How many payloads of a donor are pending, and how many were published."""
        inbox = self._donors[name].inbox
        pending = inbox.pending()
        return pending, inbox.num_settled() + pending

    def alarms(self) -> dict[str, dict[str, int]]:
        """By donor, how many of its payloads have raised which alarm."""
        return {name: donor.inbox.sentinel.counts for name, donor in self._donors.items()}

    def event_metrics(self) -> dict[str, float]:
        """Whether each donor is there, and the alarms that its newest payload raised, by tag."""
        metrics = {}
        for name, donor in self._donors.items():
            metrics[f"events/{name} present (0 or 1)"] = float(not donor.inbox.donor_is_away)
            metrics[f"events/alarms {name} (alarms)"] = float(len(donor.inbox.sentinel.alarms))
        return metrics

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold; fit for JSON."""
        donors = {name: donor.inbox.state() for name, donor in self._donors.items()}
        return {"digests": self._digests, "donors": donors}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state`."""
        self._digests.clear()
        self._digests.update({int(step): digest for step, digest in state["digests"].items()})
        for name, inbox_state in state["donors"].items():
            if name not in self._donors:
                self._add(name)
            self._donors[name].inbox.load_state(inbox_state)


def open_donors(
    transport: DirectoryTransport,
    config: BridgeConfig,
    *,
    backbone: Collection[str],
    expected: Mapping[str, Mapping[str, Tensor]],
    read: Callable[[str, int], Record],
    open_wait: Callable[[PeerWatch, str], Wait],
) -> Donors:
    """The donors of a receiver's run.

    Args:
        transport: the run's transport.
        config: the receiver's settings.
        backbone: names of its tensors.
        expected: by head, the parameters that a gradient must fit, by name.
        read: reads and verifies a record of a stream.
        open_wait: begins the wait for a donor, from its watch and what is waited for.
    """

    def open_inbox(donor: str, digests: Mapping[int, str], is_new: bool) -> Inbox:
        inbox = Inbox(
            donor,
            transport=transport,
            read=functools.partial(read, donor),
            expected=expected,
            kind="delta" if config.exchange == "delta" else "gradient",
            unit=config.unit,
            sentinel=Sentinel(donor, backbone),
            rejects_alarms=config.on_alarm == "reject",
            max_staleness=config.payload_age if config.follows else None,
            digests=digests,
            is_new=is_new,
        )
        may_teach = config.has_teachers and config.takes_left_weights
        has_left_weights = bool(transport.sequences(stream_of(donor)))
        if may_teach and has_left_weights and has_ended(transport, donor):
            inbox.donor_is_away = True  # not waited for: these may teach
        return inbox

    def head_of(donor: str) -> str:
        claim = read_claim(transport, donor) or {}
        return str(next(iter(claim.get("heads", expected))))

    return Donors(
        transport,
        open_inbox=open_inbox,
        open_wait=open_wait,
        head_of=head_of,
        num_expected=config.num_donors,
        max_staleness=config.payload_age,
        peer_wait=config.peer_wait,
    )


def _warn(reason: str, step: int) -> None:
    logger.warning(
        "TRAINING ALONE: %s. From receiver step %d on its head and its part of the backbone's "
        "gradient are missing, until it comes back",
        reason, step,
    )  # fmt: skip
