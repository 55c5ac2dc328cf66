"""What a step costs, and what a run keeps, does not grow with what was before."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.streams import Bridge
from toolkit.bridge import inbox
from toolkit.bridge.config import BridgeConfig
from toolkit.bridge.errors import BridgeError
from toolkit.bridge.inbox import MISSING_SECONDS
from toolkit.bridge.payload import Header, Record
from toolkit.bridge.payload_outbox import PayloadOutbox
from toolkit.bridge.publisher import Publisher
from toolkit.bridge.transport import DirectoryTransport
from toolkit.bridge.weights_inbox import WeightsInbox

NUM_KEPT = 40
REFUSED_KEPT = 100


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many names each listing of a directory gave."""
    numbers: list[int] = []
    listdir = os.listdir

    def counting(path: Any = ".") -> list[str]:
        names = listdir(path)
        numbers.append(len(names))
        return names

    monkeypatch.setattr(os, "listdir", counting)
    return numbers


class Outbox:
    """A donor's payloads, without tensors, on their way to a receiver that is this test."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.transport = DirectoryTransport(root)
        self.publisher = Publisher(self.transport, "donor", "run", 10_000)

        def read(sequence: int) -> Record:
            raise FileNotFoundError

        self.inbox = WeightsInbox("donor", self.transport, read, is_resumed=False)
        self._outbox = PayloadOutbox(
            self.transport, self.publisher, self.inbox, BridgeConfig(**settings)
        )
        self.step = 0

    def publish(self) -> None:
        header = Header(
            kind="skip", run_id="run", job="donor", attempt=1, receiver_step=self.step,
            weights_digest=f"weights-{self.step}",
        )  # fmt: skip
        self._outbox.publish(header, {})
        self.step += 1


def test_that_what_a_donor_keeps_is_not_listed_at_every_step(
    tmp_path: Path, listed: list[int]
) -> None:
    outbox = Outbox(tmp_path)
    outbox.publish()
    listed.clear()
    for _ in range(NUM_KEPT):
        outbox.publish()
    assert listed == []
    outbox.transport.acknowledge("donor", 30)
    outbox.publish()
    assert outbox.transport.sequences("donor") == list(range(30, NUM_KEPT + 2))
    assert sorted(outbox.inbox._answered.values()) == list(range(30, NUM_KEPT + 2))


def test_that_the_budget_holds_between_two_listings(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, payload_budget_files=5)
    for _ in range(6):
        outbox.publish()
    with pytest.raises(BridgeError, match="6 payloads"):
        outbox.publish()
    outbox.transport.acknowledge("donor", 4)
    for _ in range(4):
        outbox.publish()
    with pytest.raises(BridgeError, match="6 payloads"):
        outbox.publish()
    with pytest.raises(BridgeError, match="6 payloads"):
        Outbox(tmp_path, payload_budget_files=5).publish()


def test_that_a_receiver_that_waits_does_not_list_what_the_donor_keeps(
    tmp_path: Path, listed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = Bridge(DirectoryTransport(tmp_path))
    monkeypatch.setattr(inbox, "time", SimpleNamespace(monotonic=lambda: bridge.now))
    for _ in range(3):
        bridge.donate(at=bridge.step)
        bridge.take()
    listed.clear()
    for _ in range(5):
        assert bridge.look() is None
    assert listed == [], "a payload that is not there yet is no payload that was lost"
    bridge.now += MISSING_SECONDS
    assert bridge.look() is None
    assert listed == [3]


def test_that_of_records_that_were_refused_the_newest_stay(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    transport = outbox.transport
    for number in range(3 * REFUSED_KEPT):
        outbox.publish()
        transport.reject("donor", number, "alarm", "")
        transport.acknowledge("donor", number)  # this one may be asked for again
    aside = sorted(os.listdir(tmp_path / "donor" / "rejected"))
    assert len(aside) <= 2 * 2 * REFUSED_KEPT, "a record and a note of each"
    newest = range(2 * REFUSED_KEPT, 3 * REFUSED_KEPT)
    assert {f"{n:010d}.{end}" for n in newest for end in ("json", "safetensors")} <= set(aside)
    assert transport.rejected("donor")[-1] == 3 * REFUSED_KEPT - 1


def test_that_refused_records_that_may_be_asked_for_stay(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    transport = outbox.transport
    for number in range(20):
        outbox.publish()
        transport.reject("donor", number, "alarm", "")
    transport.prune_rejected("donor", 10, keep=3)
    assert transport.rejected("donor") == list(range(10, 20))
    transport.prune_rejected("donor", 20, keep=3)
    assert transport.rejected("donor") == [17, 18, 19]
    assert os.listdir(tmp_path / "donor" / "records") == []


def test_that_a_number_whose_note_is_gone_is_not_used_again(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    for number in range(8):
        outbox.publish()
        outbox.transport.reject("donor", number, "alarm", "")
    outbox.transport.acknowledge("donor", 8)
    outbox.transport.prune_rejected("donor", 8, keep=1)
    assert Publisher(outbox.transport, "donor", "run", 10_000).next_sequence == 8
    outbox.publish()
    outbox.transport.reject("donor", 8, "alarm", "")
    assert Publisher(outbox.transport, "donor", "run", 10_000).next_sequence == 9
