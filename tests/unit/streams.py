"""A donor's stream of real records, and the receiver's inbox over it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from toolkit.bridge.inbox import Inbox, Verdict
from toolkit.bridge.ledger import Ledger
from toolkit.bridge.liveness import PeerWatch
from toolkit.bridge.payload import Header, Kind, Record, check_identity, parse_record, write_record
from toolkit.bridge.sentinel import Sentinel
from toolkit.bridge.transport import DirectoryTransport

HEAD = "heads.h2"
SCHEMA = {HEAD: {"w": torch.zeros(3)}}


def digest(step: int) -> str:
    return f"weights-{step}"


def publish(transport: DirectoryTransport, sequence: int, content: bytes = b"content") -> int:
    """Publish these bytes, which are no record, as the donor."""
    return transport.publish("donor", sequence, lambda path: path.write_bytes(content))


@dataclasses.dataclass
class Bridge:
    """A donor's stream on disk and the receiver's inbox over it."""

    transport: DirectoryTransport
    now: float = 1000.0
    published: int = 0
    step: int = 0
    max_staleness: int = 0
    rejects_alarms: bool = False

    def __post_init__(self) -> None:
        self.transport.open_stream("donor")
        self.peer = PeerWatch(self.transport, "donor", lambda: self.now)
        self.ledger = Ledger(None)
        self.start()

    def start(self) -> None:
        """A new attempt of the receiver, with nothing in memory."""
        self.digests = {self.step: digest(self.step)}
        self.inbox = Inbox(
            "donor", transport=self.transport, read=self.read, expected=SCHEMA,
            kind="gradient", unit="samples", sentinel=Sentinel("donor", ["w"]),
            rejects_alarms=self.rejects_alarms,
            max_staleness=self.max_staleness, digests=self.digests,
        )  # fmt: skip

    def read(self, sequence: int) -> Record:
        record = parse_record(
            self.transport.read("donor", sequence, max_bytes=10_000), self.transport.signer
        )
        check_identity(record.header, run_id="run", job="donor", sequence=sequence)
        return record

    def donate(
        self,
        at: int,
        kind: Kind = "gradient",
        tensors: dict[str, Tensor] | None = None,
        **changes: Any,
    ) -> int:
        """Publish the donor's next record, taken at the weights after ``at`` steps."""
        sequence = self.published
        header = Header(
            kind=kind, run_id="run", job="donor", sequence=sequence, attempt=1, receiver_step=at,
            weights_digest=digest(at), head=HEAD, count=4.0,
        )  # fmt: skip
        header = dataclasses.replace(header, **changes)
        if tensors is None:
            tensors = {"w": torch.full((3,), float(sequence))} if kind == "gradient" else {}
        signer = self.transport.signer
        self.transport.publish(
            "donor", sequence, lambda path: write_record(path, header, tensors, signer)
        )
        self.published += 1
        return sequence

    def damage(self, sequence: int) -> None:
        path = self.transport.path("donor", sequence)
        path.write_bytes(path.read_bytes()[:-5])

    def look(self) -> Verdict | None:
        return self.inbox.look(self.step, self.peer)

    def take(self) -> Verdict:
        """Look, and let the step happen."""
        verdict = self.look()
        assert verdict is not None, f"step {self.step} waits"
        return self.settle(verdict)

    def settle(self, verdict: Verdict) -> Verdict:
        self.ledger.note(self.inbox.settle(verdict))
        self.ledger.flush()
        self.step += 1
        self.digests[self.step] = digest(self.step)
        return verdict

    def fates(self) -> dict[str, int]:
        return {fate: count for fate, count in self.ledger.counts("donor").items() if count}
