"""A finished run's payloads in place of a donor: the same step takes the same payload again.

:class:`Replay` stands where the :class:`~toolkit.bridge.inbox.Inbox` stands. It judges nothing and
waits for nobody: which payload a receiver step takes, or that it takes none, is what the run's
ledger says. The run itself is only read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from toolkit.bridge.errors import BridgeError, PayloadError
from toolkit.bridge.inbox import Verdict
from toolkit.bridge.ledger import Entry, read_path
from toolkit.bridge.liveness import PeerWatch
from toolkit.bridge.payload import Record, check_identity, parse_record
from toolkit.bridge.runs import newest_attempt
from toolkit.bridge.transport import DirectoryTransport


class KeptPayloads:
    """The payloads that a run applied on the way to its weights, and when.

    Args:
        run_dir: the run's directory.

    Attributes:
        run_id: of the run.
        attempt: the receiver's newest start, which reached the weights.
        path: the fates on the way, in order; those of a start that was gone back behind are not.

    Raises:
        BridgeError: if the run or its ledger cannot be read.
    """

    def __init__(self, run_dir: Path) -> None:
        self._transport = DirectoryTransport(run_dir / "bridge")
        try:
            self.run_id = str(json.loads((run_dir / "bridge" / "run.json").read_bytes())["run_id"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BridgeError(f"{run_dir} is no run of the bridge: {error}") from None
        self.attempt = newest_attempt(run_dir, "receiver")
        self.path = read_path(run_dir, self.attempt)
        self._digests = {entry.sequence: entry.digest for entry in self.applied}

    @property
    def applied(self) -> list[Entry]:
        """The fates of the payloads that were applied, in order."""
        return [entry for entry in self.path if entry.fate == "applied"]

    def read(self, sequence: int) -> Record:
        """One payload that was applied, with exactly the tensors that the ledger names.

        Raises:
            BridgeError: if it is not there, was changed, or is not what the ledger names.
        """
        path = self._transport.kept_path("donor", sequence)
        try:
            record = parse_record(path.read_bytes())
            check_identity(record.header, run_id=self.run_id, job="donor", sequence=sequence)
        except OSError as error:
            raise BridgeError(
                f"payload {sequence} was applied but is not kept: {error}. Every start of the "
                "receiver, a resume too, needs --keep_payloads"
            ) from None
        except PayloadError as error:
            raise BridgeError(f"payload {sequence} ({path}) was changed: {error}") from None
        if record.header.tensors_digest != self._digests[sequence]:
            raise BridgeError(
                f"payload {sequence} ({path}) is not the one that was applied: its digest is "
                f"{record.header.tensors_digest[:12]}, the ledger has "
                f"{self._digests[sequence][:12] or 'none'}"
            )
        return record


class Replay:
    """What an inbox would say if everything came as it came in the run.

    Args:
        entries: the fates on the way to the run's weights, in order.
        read: reads and verifies an applied payload.

    Attributes:
        departed_at: receiver steps after which the weights were first seen to be others than the
            run's, which the payloads name; None if that was never seen.
    """

    cursor = 0  # nothing is acknowledged
    donor_is_away = True  # nobody is waited for, and weights are published for nobody

    def __init__(self, entries: Iterable[Entry], read: Callable[[int], Record]) -> None:
        self._read = read
        self._by_step: dict[int, tuple[Entry, ...]] = {}
        for entry in entries:
            earlier = self._by_step.get(entry.receiver_step, ())
            self._by_step[entry.receiver_step] = (*earlier, entry)
        self._digests: dict[int, str] = {}  # of the weights, by receiver step
        self._num_settled = 0
        self.fetched: Record | None = None
        self.departed_at: int | None = None

    def remember(self, receiver_step: int, digest: str) -> None:
        """Note the digest of the weights after ``receiver_step`` steps."""
        self._digests[receiver_step] = digest

    def look(self, receiver_step: int, peer: PeerWatch) -> Verdict:
        """What the run did at this step; the same again if a loss scaler skips the step."""
        entries = self._by_step.get(receiver_step, ())
        applied = next((entry for entry in entries if entry.fate == "applied"), None)
        if applied is None:
            return Verdict(0, -1, entries)
        self.fetched = record = self._read(applied.sequence)
        at = record.header.receiver_step
        if self.departed_at is None and self._digests.get(at) != record.header.weights_digest:
            self.departed_at = at
        digest = record.header.tensors_digest
        return Verdict(0, -1, entries, applied.sequence, digest, receiver_step - at)

    def give_up(self, receiver_step: int, peer: PeerWatch) -> Verdict:
        """As :meth:`look`: there is nobody to wait for."""
        return self.look(receiver_step, peer)

    def settle(self, verdict: Verdict) -> tuple[Entry, ...]:
        """The step happened; the fates that it settled in the run."""
        self._num_settled += len(verdict.entries)
        return verdict.entries

    def reject(self, sequence: int, error: PayloadError) -> None:
        """A payload that was good in the run is not passed over: end."""
        raise BridgeError(f"payload {sequence} cannot be replayed: {error}")

    def pending(self) -> int:
        """Nothing waits for a fate."""
        return 0

    def num_settled(self) -> int:
        """Payloads with a fate so far."""
        return self._num_settled

    def state(self) -> dict[str, Any]:
        """Nothing: the ledger says all."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore; what was settled before is counted in the ledger."""
