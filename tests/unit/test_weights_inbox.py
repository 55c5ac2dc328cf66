"""Which weights a donor still has to answer."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest

from toolkit.bridge.liveness import PeerWatch
from toolkit.bridge.payload import Header, Record, parse_record
from toolkit.bridge.publisher import Publisher
from toolkit.bridge.transport import DirectoryTransport
from toolkit.bridge.weights_inbox import WeightsInbox

WEIGHTS = Header(
    kind="weights", run_id="run", job="receiver", attempt=1, receiver_step=7, weights_digest="abc"
)
PAYLOAD = dataclasses.replace(WEIGHTS, kind="gradient", job="donor", count=5.0, donor_step=8)


class KilledError(BaseException):
    """The process ends here."""


def read(transport: DirectoryTransport, sequence: int) -> Record:
    return parse_record(transport.read("receiver", sequence, max_bytes=10_000))


@pytest.mark.parametrize("is_refused", [False, True])
def test_that_a_refused_payload_is_no_answer_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_refused: bool
) -> None:
    """The receiver was killed after its note, before it had moved the payload aside."""
    transport = DirectoryTransport(tmp_path)
    Publisher(transport, "receiver", "run", 10_000).publish(WEIGHTS, {})
    Publisher(transport, "donor", "run", 10_000).publish(PAYLOAD, {})

    def die(path: Path, target: Path) -> None:
        raise KilledError

    if is_refused:
        monkeypatch.setattr(Path, "rename", die)
        with pytest.raises(KilledError):
            transport.reject("donor", 0, "digest", "the tensors' digest does not match")
        assert transport.rejection("donor", 0) == "digest"
        assert transport.sequences("donor") == [0]

    restarted = WeightsInbox("donor", transport, partial(read, transport), is_resumed=True)

    assert restarted.look(PeerWatch(transport, "receiver")) is (True if is_refused else None)
    assert restarted.completed_windows == (0 if is_refused else 8)


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_receiver_that_has_ended_while_the_donor_joined(tmp_path: Path, is_resumed: bool) -> None:
    transport = DirectoryTransport(tmp_path)
    publisher = Publisher(transport, "receiver", "run", 10_000)
    publisher.publish(WEIGHTS, {})
    publisher.publish(dataclasses.replace(WEIGHTS, kind="end", weights_digest=""), {})

    inbox = WeightsInbox("donor", transport, partial(read, transport), is_resumed=is_resumed)
    found = inbox.look(PeerWatch(transport, "receiver"))
    assert found is (None if is_resumed else False), "one that is resumed waits for the receiver's"


def test_a_receiver_that_is_resumed_while_the_donor_looks_at_its_end(tmp_path: Path) -> None:
    resumed = dataclasses.replace(WEIGHTS, attempt=2)

    class Transport(DirectoryTransport):
        def read_header(self, job: str, sequence: int) -> Header:
            header = super().read_header(job, sequence)
            if header.kind == "end":
                publisher.publish(resumed, {})
            return header

    transport = Transport(tmp_path)
    publisher = Publisher(transport, "receiver", "run", 10_000)
    publisher.publish(dataclasses.replace(WEIGHTS, kind="end", weights_digest=""), {})

    inbox = WeightsInbox("donor", transport, partial(read, transport), is_resumed=True)
    assert inbox.look(PeerWatch(transport, "receiver"))
    assert inbox.fetched is not None
    assert inbox.fetched.header.attempt == 2
