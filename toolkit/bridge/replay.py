"""A finished run's payloads in place of a donor: the same step takes the same payload again.

:class:`Replay` stands where :class:`~toolkit.bridge.donors.Donors` stands. It judges nothing and
waits for nobody: which payloads a receiver step takes, or that it takes none, is what the run's
ledger says. The run itself is only read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from toolkit.bridge import files
from toolkit.bridge.agreement import attempts_of, open_bridge, read_claim
from toolkit.bridge.authentication import UNSIGNED, Signer
from toolkit.bridge.errors import BridgeError, PayloadError
from toolkit.bridge.inbox import Verdict
from toolkit.bridge.ledger import Entry, read_path
from toolkit.bridge.liveness import Wait
from toolkit.bridge.payload import Record, check_identity, parse_record


class KeptPayloads:
    """The payloads that a run applied on the way to its weights, and when.

    Args:
        run_dir: the run's directory.
        signer: of this job, with the run's key if it has one.

    Attributes:
        run_id: of the run.
        attempt: the receiver's newest start, which reached the weights.
        path: the fates on the way, in order; those of a start that was gone back behind are not.

    Raises:
        BridgeError: if the run or its ledger cannot be read.
    """

    def __init__(self, run_dir: Path, signer: Signer = UNSIGNED) -> None:
        transport = open_bridge(run_dir, signer)
        if transport is None:
            raise BridgeError(f"{run_dir} is no run of the bridge: there is no bridge/run.json")
        self._transport, self.run_id = transport, transport.signer.run_id
        self.attempt = max(attempts_of(transport, "receiver"), default=0)
        claim = read_claim(transport, "receiver") or {}
        self._max_bytes = int(claim.get("record_bytes", 0))
        self.path = read_path(run_dir, self.attempt)
        self._digests = {(entry.donor, entry.sequence): entry.digest for entry in self.applied}

    @property
    def applied(self) -> list[Entry]:
        """The fates of the payloads that were applied, in order."""
        return [entry for entry in self.path if entry.fate == "applied"]

    def read(self, donor: str, sequence: int) -> Record:
        """One payload that was applied, with exactly the tensors that the ledger names.

        Raises:
            BridgeError: if it is not there, was changed, or is not what the ledger names.
        """
        path = self._transport.kept_path(donor, sequence)
        try:
            data = files.read_plain(path, self._max_bytes)
            record = parse_record(data, self._transport.signer)
            check_identity(record.header, run_id=self.run_id, job=donor, sequence=sequence)
        except OSError as error:
            raise BridgeError(
                f"payload {sequence} was applied but is not kept: {error}. Every "
                "start of the receiver, a resume too, needs --keep_payloads"
            ) from None
        except PayloadError as error:
            raise BridgeError(f"payload {sequence} ({path}) was changed: {error}") from None
        expected = self._digests[donor, sequence]
        if record.header.tensors_digest != expected:
            raise BridgeError(
                f"payload {sequence} ({path}) is not the one that was applied: its digest is "
                f"{record.header.tensors_digest[:12]}, the ledger has {expected[:12] or 'none'}"
            )
        return record


class Replay:
    """What :class:`~toolkit.bridge.donors.Donors` would say if all came as it came in the run.

    Args:
        kept: the run's payloads, and the fates on the way to its weights.
        read: reads one of the payloads, by donor and number, and decompresses it.

    Attributes:
        departed_at: receiver steps after which the weights were first seen to be others than the
            run's, which the payloads name; None if that was never seen.
    """

    def __init__(self, kept: KeptPayloads, read: Callable[[str, int], Record]) -> None:
        self._read = read
        self._by_step: dict[int, dict[str, tuple[Entry, ...]]] = {}
        for entry in kept.path:
            of_step = self._by_step.setdefault(entry.receiver_step, {})
            of_step[entry.donor] = (*of_step.get(entry.donor, ()), entry)
        self._num_settled = {entry.donor: 0 for entry in kept.path}
        self._digests: dict[int, str] = {}  # of the weights, by receiver step
        self._fetched: dict[str, Record] = {}
        self.departed_at: int | None = None

    @property
    def names(self) -> list[str]:
        """The donors of the run."""
        return list(self._num_settled)

    @property
    def num_away(self) -> int:
        """None of them goes away."""
        return 0

    def want_weights(self) -> bool:
        """Weights are published for nobody."""
        return False

    def require_peers(self) -> None:
        """Nobody is missed."""

    def discover(self) -> None:
        """All are known."""

    def begin(self) -> None:
        """There is nobody to ask."""

    def waits(self) -> list[Wait]:
        """None: what a step takes is there."""
        return []

    def remember(self, receiver_step: int, digest: str) -> None:
        """Note the digest of the weights after ``receiver_step`` steps."""
        self._digests[receiver_step] = digest

    def look(self, receiver_step: int, without: Collection[str] = ()) -> tuple[Verdict, ...]:
        """What the run did at this step; the same again if a loss scaler skips the step."""
        by_donor = self._by_step.get(receiver_step, {})
        return tuple(self._verdict(receiver_step, *item) for item in by_donor.items())

    def _verdict(self, receiver_step: int, donor: str, entries: tuple[Entry, ...]) -> Verdict:
        applied = next((entry for entry in entries if entry.fate == "applied"), None)
        if applied is None:
            return Verdict(donor, 0, -1, entries)
        self._fetched[donor] = record = self._read(donor, applied.sequence)
        at = record.header.receiver_step
        if self.departed_at is None and self._digests.get(at) != record.header.weights_digest:
            self.departed_at = at
        digest = record.header.tensors_digest
        return Verdict(donor, 0, -1, entries, applied.sequence, digest, receiver_step - at)

    def fetched(self, verdict: Verdict) -> Record | None:
        """The record that a verdict of this step speaks of."""
        return self._fetched.get(verdict.donor)

    def reject(self, verdict: Verdict, error: PayloadError) -> None:
        """A payload that was good in the run is not passed over: end."""
        raise BridgeError(f"payload {verdict.sequence} cannot be replayed: {error}")

    def settle(self, verdicts: Iterable[Verdict]) -> list[Entry]:
        """The step happened; the fates that it settled in the run."""
        entries = [entry for verdict in verdicts for entry in verdict.entries]
        for entry in entries:
            self._num_settled[entry.donor] += 1
        return entries

    def cursors(self) -> dict[str, int]:
        """Nothing is acknowledged."""
        return {}

    def published(self, name: str) -> tuple[int, int]:
        """Payloads of a donor that wait for a fate, none, and those with one so far."""
        return 0, self._num_settled[name]

    def alarms(self) -> dict[str, dict[str, int]]:
        """None: the run has raised them."""
        return {}

    def event_metrics(self) -> dict[str, float]:
        """None, likewise."""
        return {}

    def state(self) -> dict[str, Any]:
        """Nothing: the ledger says all."""
        return {"digests": {}, "donors": {}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore; what was settled before is counted in the ledger."""
