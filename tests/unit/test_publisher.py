"""The numbers under which one job publishes, across its restarts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.keys import SIGNER
from toolkit.bridge.authentication import UNSIGNED, Signer
from toolkit.bridge.payload import Header
from toolkit.bridge.publisher import Publisher
from toolkit.bridge.transport import DirectoryTransport

HEADER = Header(
    kind="gradient", run_id="run", job="", attempt=1, receiver_step=0, weights_digest="", count=1.0
)


@pytest.fixture(params=[UNSIGNED, SIGNER], ids=["no key", "key"])
def transport(request: pytest.FixtureRequest, tmp_path: Path) -> DirectoryTransport:
    signer: Signer = request.param
    return DirectoryTransport(tmp_path, signer)


def started(transport: DirectoryTransport, run_id: str = "run") -> Publisher:
    return Publisher(transport, "donor", run_id, 10_000)


def publish(transport: DirectoryTransport, number: int) -> Publisher:
    """So many records, of a job that then ends."""
    publisher = started(transport)
    for _ in range(number):
        publisher.publish(HEADER, {"w": torch.ones(3)})
    return publisher


def test_that_a_restart_continues_after_the_newest(transport: DirectoryTransport) -> None:
    assert started(transport).next_sequence == 0
    publish(transport, 3)

    assert started(transport).next_sequence == 3


@pytest.mark.parametrize("content", [b"no record", None], ids=["junk", "another place's record"])
def test_that_an_alien_file_with_a_high_number_leads_nowhere(
    transport: DirectoryTransport, content: bytes | None
) -> None:
    # the files of another run, copied into this one: a restarted donor went on at 5001, and
    # the receiver waited for every number before, some seconds each.
    publish(transport, 3)
    record = transport.path("donor", 2).read_bytes()
    transport.path("donor", 5000).write_bytes(record if content is None else content)

    assert started(transport).next_sequence == 3


def test_that_a_record_of_another_run_leads_nowhere(tmp_path: Path) -> None:
    transport = DirectoryTransport(tmp_path)  # with a key its signature would say so
    publish(transport, 3)

    assert started(transport, "another run").next_sequence == 0


def test_that_no_number_comes_again_though_all_is_pruned(transport: DirectoryTransport) -> None:
    publisher = publish(transport, 3)
    transport.path("donor", 5000).write_bytes(b"no record")
    publisher.prune(3)

    assert transport.sequences("donor") == [2, 5000]
    assert started(transport).next_sequence == 3


def test_that_the_number_of_a_refused_record_does_not_come_again(
    transport: DirectoryTransport,
) -> None:
    publisher = publish(transport, 3)
    transport.path("donor", 5000).write_bytes(b"no record")
    transport.reject("donor", 2, "digest", "")
    publisher.prune(3)

    assert started(transport).next_sequence == 3
