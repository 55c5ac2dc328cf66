"""A receiver's donors, over records that a test writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from toolkit.bridge.donors import Donors
from toolkit.bridge.inbox import Inbox
from toolkit.bridge.liveness import PeerWatch, Wait
from toolkit.bridge.payload import Header, Kind, Record, parse_record, write_record
from toolkit.bridge.sentinel import Sentinel
from toolkit.bridge.transport import DirectoryTransport

PATIENCE = 0.05  # seconds


class Run:
    """A receiver's donors, whose records this test writes."""

    def __init__(
        self,
        root: Path,
        num_expected: int = 1,
        require_peer: bool = False,
        max_staleness: int | None = 0,
    ) -> None:
        self.transport = DirectoryTransport(root)
        self.require_peer, self.max_staleness = require_peer, max_staleness
        self.donors = Donors(
            self.transport,
            open_inbox=self.open_inbox,
            open_wait=self.open_wait,
            head_of=lambda donor: "heads.h2",
            num_expected=num_expected,
            max_staleness=0,
            peer_wait=PATIENCE,
        )
        self.step = -1
        self.next_step()

    def open_inbox(self, donor: str, digests: Mapping[int, str], is_new: bool) -> Inbox:
        def read(sequence: int) -> Record:
            return parse_record(self.transport.read(donor, sequence, max_bytes=10_000))

        expected = {"heads.h2": {"w": torch.zeros(3)}}
        return Inbox(
            donor, transport=self.transport, read=read, expected=expected,
            kind="gradient", unit="samples", sentinel=Sentinel(donor, []),
            max_staleness=self.max_staleness, digests=digests, is_new=is_new,
        )  # fmt: skip

    def open_wait(self, peer: PeerWatch, what: str) -> Wait:
        return Wait(peer, what, PATIENCE, self.require_peer, "start it")

    def donate(self, donor: str, sequence: int, at: int, kind: Kind = "gradient") -> None:
        header = Header(
            kind=kind, run_id="run", job=donor, sequence=sequence, attempt=1, receiver_step=at,
            weights_digest=f"weights-{at}", head="heads.h2", count=4.0,
        )  # fmt: skip
        tensors = {"w": torch.ones(3)} if kind == "gradient" else {}
        self.transport.open_stream(donor)
        self.transport.publish(donor, sequence, lambda path: write_record(path, header, tensors))

    def next_step(self) -> None:
        self.step += 1
        self.donors.remember(self.step, f"weights-{self.step}")
        self.donors.begin()

    def take(self) -> dict[str, int | None]:
        """The payload of each donor in this step, once there is a decision; the step happens."""
        while (verdicts := self.donors.look(self.step)) is None:
            pass
        self.donors.settle(verdicts)
        self.next_step()
        return {v.donor: v.sequence if v.digest else None for v in verdicts}
